import numpy as np

from attention_jax.tasks.detection import prediction


def found(*rows):
    boxes, scores, classes = zip(*rows, strict=True)
    return {
        'boxes': np.array(boxes, np.float32),
        'scores': np.array(scores, np.float32),
        'classes': np.array(classes, np.int32),
    }


def test_no_box_crosses_a_name():
    photo = np.full((200, 300, 3), 255, np.uint8)
    worse, better = ((40, 60, 200, 150), 0.5, 0), ((20, 20, 70, 180), 0.9, 1)
    names = ('cat', 'dog')
    both = np.asarray(prediction.draw(photo, found(worse, better), names))
    alone = np.asarray(prediction.draw(photo, found(worse), names))
    label = alone[50:58, 42:80]  # above the box, where the other's right side passes
    assert len(np.unique(label.reshape(-1, 3), axis=0)) > 2
    np.testing.assert_array_equal(both[50:58, 42:80], label)
    assert (both != alone).any()


def test_names_that_the_font_has_not_are_numbers():
    photo = np.zeros((100, 150, 3), np.uint8)
    rows = found(((20, 30, 90, 80), 0.75, 1))
    drawn = [prediction.draw(photo, rows, names) for names in ((), ('a', '細胞'), ('a', '1'))]
    np.testing.assert_array_equal(*drawn[:2])
    np.testing.assert_array_equal(*drawn[1:])
