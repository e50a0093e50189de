import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.tasks.detection import boxes

SQUARE = np.array([0.5, 0.5, 1.0, 1.0])


def test_iou_of_boxes_known_on_paper():
    shifted = np.array([[1.0, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], [3, 3, 1, 1], [0.5, 0.5, 1, 1]])
    got = boxes.iou(SQUARE[None], shifted)
    np.testing.assert_allclose(got, [1 / 3, 1 / 4, 0, 1], rtol=1e-6)
    assert boxes.iou(np.zeros(4), np.zeros(4)) == 0  # nothing over nothing


def test_ciou_of_boxes_known_on_paper():
    assert boxes.ciou(SQUARE, SQUARE) == pytest.approx(1.0)
    # Same shape, apart by (2, 0): no overlap, distance 4, diagonal 3^2 + 1.
    np.testing.assert_allclose(boxes.ciou(SQUARE, SQUARE + np.array([2, 0, 0, 0])), -0.4, rtol=1e-6)
    # Same centre, half the width: IoU 1/2, and the aspect's term.
    v = 4 / np.pi**2 * (np.pi / 4 - np.arctan(0.5)) ** 2
    want = 0.5 - v * v / (0.5 + v)
    np.testing.assert_allclose(boxes.ciou(SQUARE, SQUARE * [1, 1, 0.5, 1]), want, rtol=1e-6)


def test_gradient_flows_through_alpha_unless_stopped(x64):
    a, b = np.array([0.4, 0.5, 0.6, 0.2]), np.array([0.5, 0.5, 0.3, 0.4])
    flowing = jax.grad(boxes.ciou)(a, b)
    stopped = jax.grad(lambda a, b: boxes.ciou(a, b, stop_alpha_gradient=True))(a, b)
    steps = 1e-6 * np.eye(4)
    numeric = [(boxes.ciou(a + s, b) - boxes.ciou(a - s, b)) / 2e-6 for s in steps]
    np.testing.assert_allclose(flowing, numeric, rtol=1e-6, atol=1e-8)
    assert np.abs(flowing - stopped).max() > 1e-3
    assert boxes.ciou(a, b) == boxes.ciou(a, b, stop_alpha_gradient=True)


def test_gradients_of_empty_boxes_are_finite():
    for a, b in ((np.zeros(4), np.zeros(4)), (np.zeros(4), SQUARE), (SQUARE, SQUARE)):
        for function in (boxes.iou, boxes.ciou):
            both = jax.grad(function, (0, 1))(jnp.asarray(a), jnp.asarray(b))
            assert all(np.isfinite(g).all() for g in both)


@pytest.mark.parametrize('shape', [(480, 640), (640, 480), (100, 100), (33, 500)])
def test_from_letterbox_undoes_it(x64, shape):
    size = (128, 96)
    new = np.round(np.array(shape) * min(size[0] / shape[0], size[1] / shape[1]))
    corners = np.array([0.1, 0.2, 0.5, 0.9])  # x1, y1, x2, y2 over the photo
    low = (np.array(size) - new) / 2
    on_canvas = (corners.reshape(2, 2) * new[::-1] + low[::-1]) / np.array(size)[::-1]
    center, sides = on_canvas.mean(0), on_canvas[1] - on_canvas[0]
    got = boxes.from_letterbox(np.concatenate([center, sides]), size, shape)
    np.testing.assert_allclose(got, corners * np.array([shape[1], shape[0]] * 2), rtol=1e-12)


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match='boxes'):
        boxes.iou(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match='shapes'):
        boxes.iou(np.zeros((2, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match='boxes must be'):
        boxes.from_letterbox(np.zeros((2, 3)), (4, 4), (4, 4))
