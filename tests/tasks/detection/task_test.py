import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import data
from attention_jax.tasks import create_task, open_source
from attention_jax.tasks.detection import yolo
from configs import yolov4_tiny
from tests import helpers

NAMES = ('cat', 'dog', 'owl')


@dataclasses.dataclass(frozen=True)
class Description:
    name: str = 'made up'
    image_shape: tuple[int, int, int] = (64, 96, 3)
    num_classes: int = 3
    class_names: tuple[str, ...] = NAMES


def make_task(**changes):
    config = yolov4_tiny.get_config()
    config.model.arguments.width = 0.125
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return create_task(config, Description())


def confident_outputs(boxes, classes, task):
    """Raw outputs that decode to these boxes of one image with certainty, and to nothing else."""
    model = task.model
    outputs = []
    for mask, stride in zip(model.masks, (32, 16), strict=True):
        h, w = 64 // stride, 96 // stride
        out = np.full((1, h, w, len(mask), 5 + 3), -20.0, np.float32)
        if stride == 16:
            for (cx, cy, bw, bh), label in zip(boxes, classes, strict=True):
                j, i = int(cy * h), int(cx * w)
                anchor = model.anchors[mask[0]]
                x, y = cx * w - i, cy * h - j
                out[0, j, i, 0, :5] = (
                    np.log(x / (1 - x)),
                    np.log(y / (1 - y)),
                    np.log(bw * 96 / anchor[0]),
                    np.log(bh * 64 / anchor[1]),
                    20,
                )
                out[0, j, i, 0, 5 + label] = 20
        outputs.append(jnp.asarray(out.reshape(1, h, w, -1)))
    return outputs


def eval_batch(boxes, classes, shape=(64, 96), padding=2):
    m = len(boxes) + padding
    batch = {
        'image': np.full((1, 64, 96, 3), 128, np.uint8),
        'boxes': np.zeros((1, m, 4), np.float32),
        'classes': np.full((1, m), -1, np.int32),
        'ignore': np.zeros((1, m), bool),
        'shape': np.array([shape], np.int32),
        'mask': np.ones(1, np.float32),
    }
    batch['boxes'][0, : len(boxes)] = np.reshape(boxes, (-1, 4))
    batch['classes'][0, : len(boxes)] = classes
    return batch


BOXES = [(0.2, 0.3, 0.2, 0.4), (0.7, 0.6, 0.3, 0.5)]


def test_perfect_detections_score_one_and_none_score_zero():
    task = make_task()
    batch = eval_batch(BOXES, [0, 2])
    perfect = jax.device_get(task.measure(confident_outputs(BOXES, [0, 2], task), batch))
    found = perfect['boxes'][0][perfect['classes'][0] >= 0]
    np.testing.assert_allclose(
        sorted(found.tolist()), [[9.6, 6.4, 28.8, 32.0], [52.8, 22.4, 81.6, 54.4]], atol=1e-3
    )
    results = task.results([perfect])
    assert results == {
        'AP': 1.0, 'AP50': 1.0, 'AP50_voc': 1.0, 'AP50/cat': 1.0, 'AP50/owl': 1.0
    }  # fmt: skip
    assert task.table({f'test/{k}': v for k, v in results.items()}).splitlines() == [
        'class  AP50', 'owl    1.0000', 'cat    1.0000'
    ]  # fmt: skip
    nothing = jax.device_get(task.measure(confident_outputs([], [], task), batch))
    assert task.results([nothing])['AP50'] == 0.0
    swapped = jax.device_get(task.measure(confident_outputs(BOXES, [2, 0], task), batch))
    assert task.results([swapped])['AP50'] == 0.0


def test_padding_counts_nothing_and_batches_join():
    task = make_task()
    batch = eval_batch(BOXES, [0, 2])
    outputs = confident_outputs(BOXES, [0, 2], task)
    one = jax.device_get(task.measure(outputs, batch))
    padding = {**one, 'mask': np.zeros(1, np.float32)}
    empty = jax.device_get(task.measure(outputs, eval_batch([], [])))  # false detections only
    assert task.results([one, padding]) == task.results([one])
    assert task.results([empty, one])['AP50'] < 1.0
    # Evaluation may carry more boxes than training.
    assert task.results([one, padding, one])['AP'] == 1.0


def test_a_letterboxed_photo_is_measured_in_its_own_pixels():
    task = make_task()
    # A square photo of 128 pixels stands in the middle third of the 96 pixels' width.
    inside = [(0.51, 0.52, 0.25, 0.5)]  # of the letterbox: 24 x 32 pixels, 48 x 64 of the photo
    measured = jax.device_get(
        task.measure(
            confident_outputs(inside, [1], task),
            eval_batch([(0.515, 0.52, 48 / 128, 0.5)], [1], shape=(128, 128)),
        )
    )
    np.testing.assert_allclose(measured['boxes'][0, 0], [41.92, 34.56, 89.92, 98.56], atol=1e-3)
    assert task.results([measured])['AP'] == 1.0
    pictures = task.samples(eval_batch(inside, [1], shape=(128, 128)), measured)
    assert {name: p.shape for name, p in pictures.items()} == {'detections/0': (128, 128, 3)}
    assert (pictures['detections/0'] != 128).any()


def test_samples_are_of_photos_not_of_padding():
    task = make_task()
    batch = {k: np.concatenate([v, v]) for k, v in eval_batch(BOXES, [0, 2]).items()}
    batch['mask'][0] = batch['image'][0] = 0
    outputs = confident_outputs(BOXES, [0, 2], task)
    measured = jax.device_get(task.measure([np.concatenate([o, o]) for o in outputs], batch))
    pictures = task.samples(batch, measured)
    assert set(pictures) == {'detections/0'}
    assert (pictures['detections/0'][0, 0] == 128).all()


def test_loss_is_yolos_and_its_sums_are_means_over_images():
    task = make_task()
    rng = np.random.default_rng(0)
    outputs = [
        jnp.asarray(rng.normal(size=(2, 64 // s, 96 // s, 24)), jnp.float32) for s in (32, 16)
    ]
    batch = {
        'image': np.zeros((2, 64, 96, 3), np.uint8),
        'boxes': np.array([[*BOXES], [BOXES[0], (0,) * 4]], np.float32),
        'classes': np.array([[0, 2], [1, -1]], np.int32),
    }
    loss, sums = task.loss(outputs, batch)
    want = yolo.loss(
        outputs, batch['boxes'], batch['classes'],
        image_size=(64, 96), anchors=task.model.anchors, masks=task.model.masks,
        class_weight=0.5,
    )  # fmt: skip
    assert loss == want['loss']
    means = task.metrics({k: float(v) for k, v in sums.items()})
    assert set(means) == {'loss', 'box', 'object', 'class'}
    assert means['loss'] == pytest.approx(float(loss), rel=1e-6)
    assert means['box'] + means['object'] + means['class'] == pytest.approx(float(loss), rel=1e-5)


def test_inputs_are_pixels_over_255():
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    np.testing.assert_allclose(make_task().inputs({'image': image}), image / 255, atol=1e-7)
    low = make_task(**{'train.compute_dtype': 'bfloat16'})
    assert low.inputs({'image': image}).dtype == jnp.bfloat16


def test_the_network_is_told_how_its_outputs_are_decoded():
    task = make_task(**{'detection.anchors': ((5, 6), (7, 8)), 'detection.masks': ((1,), (0,))})
    assert task.model.anchors == ((5, 6), (7, 8))
    assert (task.model.image_size, task.model.num_classes) == ((64, 96), 3)


def test_abstract_batch_is_what_the_loader_gives():
    config = yolov4_tiny.get_config()
    source = open_source(config, 'test[:10]', train=True)
    abstract = create_task(config, source.description).abstract_batch(4)
    assert helpers.shapes(abstract) == {
        'image': ((4, 160, 160, 3), jnp.uint8),
        'boxes': ((4, 16, 4), jnp.float32),
        'classes': ((4, 16), jnp.int32),
    }
    batches = data.train_batches(source, config.data, batch_size=4, seed=0)
    assert helpers.shapes(next(batches)) == helpers.shapes(abstract)
    batches.close()
    evaluated = helpers.shapes(next(iter(data.eval_batches(source, config.data, batch_size=4))))
    assert evaluated == helpers.shapes(abstract) | {
        'ignore': ((4, 16), jnp.bool_),
        'shape': ((4, 2), jnp.int32),
        'mask': ((4,), jnp.float32),
    }


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.name': 'resnet18'}, "model.name 'resnet18' does not detect: use one of yolov4"),
        ({'model.name': 'darknet53_tiny'}, "'darknet53_tiny' does not detect: use one of yolov4"),
        (
            {'model.num_classes': 80},
            'model.num_classes 80 is not the number of classes of the data, 3',
        ),
        ({'detection.anchors': (1, 2, 3)}, 'anchors must be pairs'),
        ({'detection.masks': (3, 4)}, 'masks must be two sequences of anchors'),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(**changes)


def test_truths_that_are_ignored_are_neither_asked_for_nor_false():
    task = make_task()
    batch = eval_batch(BOXES, [0, 2])
    batch['ignore'][0, 1] = True
    measured = jax.device_get(task.measure(confident_outputs(BOXES, [0, 2], task), batch))
    assert task.results([measured]) == {'AP': 1.0, 'AP50': 1.0, 'AP50_voc': 1.0, 'AP50/cat': 1.0}
    assert task.metrics({'loss': 3.0, 'box': 2.0, 'count': 2}) == {'loss': 1.5, 'box': 1.0}
