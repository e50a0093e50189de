"""The loss, the boxes and the detections of YOLOv4-tiny, beside the authors' and beside loops."""

import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.tasks.detection import boxes as box_functions
from attention_jax.tasks.detection import yolo
from attention_jax.training import sharding
from tests import helpers

ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
MASKS = ((3, 4, 5), (1, 2, 3))
FOLDER = helpers.REFERENCE / 'detection'
LOSSES = sorted(p.stem for p in FOLDER.glob('loss_*.npz'))
K, SIZE = 3, (64, 96)  # of what is drawn


def sides(meta):
    return {
        'image_size': (meta['image_size'],) * 2,
        'anchors': meta['anchors'],
        'masks': meta['masks'],
    }


def stored(name):
    arrays = dict(np.load(FOLDER / f'{name}.npz'))
    meta = json.loads(str(arrays.pop('meta')))
    outputs = [np.moveaxis(arrays[f'output{i}'], 1, -1) for i in (0, 1)]
    return meta, arrays, outputs


# Loops, as the words of the documentation have them.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop_iou(a, b):
    """(cx, cy, w, h) each: intersection and union."""
    low = [max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)]
    high = [min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) for i in (0, 1)]
    inside = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
    return inside, a[2] * a[3] + b[2] * b[3] - inside


def loop_ciou(a, b):
    inside, union = loop_iou(a, b)
    iou = inside / max(union, 1e-6)
    distance = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    around = [
        max(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2)
        - min(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2)
        for i in (0, 1)
    ]
    diagonal = max(around[0] ** 2 + around[1] ** 2, 1e-6)
    angles = [np.arctan(x[2] / max(x[3], 1e-6)) for x in (a, b)]
    v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    return iou - distance / diagonal - v / max(1 - iou + v, 1e-6) * v


def loop_bce(logit, wanted):
    p = np.clip(sigmoid(logit), 1e-7, 1 - 1e-7)
    return -wanted * np.log(p) - (1 - wanted) * np.log(1 - p)


def loop_loss(outputs, boxes, classes, image_size, anchors, masks):
    """The loss of each scale, weighted."""
    total = []
    for out, mask, stride, balance in zip(outputs, masks, (32, 16), (0.4, 1.0), strict=True):
        b, h, w, _ = out.shape
        out = out.reshape(b, h, w, len(mask), -1)
        k = out.shape[-1] - 5
        answers = {}
        for n in range(b):
            for box, label in zip(boxes[n], classes[n], strict=True):
                if label < 0:
                    continue
                pixels = (0, 0, box[2] * image_size[1], box[3] * image_size[0])
                ious = {}
                for number in sorted({m for each in masks for m in each}):
                    inside, union = loop_iou(pixels, (0, 0, *anchors[number]))
                    ious[number] = inside / union
                best = max(ious, key=lambda number: ious[number])
                if best not in mask:
                    continue
                cell = min(int(box[1] * h), h - 1), min(int(box[0] * w), w - 1)
                key = n, *cell, list(mask).index(best)
                labels = answers.get(key, (None, set()))[1] | {int(label)}
                answers[key] = box * [w, h, w, h], labels
        box_terms, class_terms, object_terms = [], [], []
        for key in np.ndindex(b, h, w, len(mask)):
            n, j, i, a = key
            o = out[key]
            anchor = np.array(anchors[mask[a]]) / stride
            decoded = np.array([sigmoid(o[0]) + i, sigmoid(o[1]) + j, *np.exp(o[2:4]) * anchor])
            if key in answers:
                box, labels = answers[key]
                box_terms.append(1 - loop_ciou(decoded, box))
                class_terms += [loop_bce(o[5 + c], float(c in labels)) for c in range(k)]
                object_terms.append(loop_bce(o[4], 1.0))
                continue
            near = False
            for box, label in zip(boxes[n], classes[n], strict=True):
                if label >= 0:
                    inside, union = loop_iou(decoded, box * [w, h, w, h])
                    near |= inside > 0.5 * union
            if not near:
                object_terms.append(loop_bce(o[4], 0.0))
        scale = image_size[0] * image_size[1] / 416**2
        total.append(
            0.05 * (np.mean(box_terms) if box_terms else 0)
            + k / 80 * (np.mean(class_terms) if class_terms else 0)
            + 5 * balance * scale * np.mean(object_terms)
        )
    return total


def loop_detect(boxes, objects, probabilities, score_threshold, iou_threshold, count):
    """Of one picture: numbers of the predictions that remain, best first."""
    scores = objects * probabilities.max(-1)
    labels = probabilities.argmax(-1)
    kept = []
    for label in range(probabilities.shape[-1]):
        rest = [n for n in np.argsort(-scores, kind='stable') if labels[n] == label]
        rest = [n for n in rest if scores[n] >= score_threshold]
        while rest:
            best, *rest = rest
            kept.append(best)
            overlaps = [loop_iou(boxes[best], boxes[n]) for n in rest]
            rest = [
                n
                for n, (inside, union) in zip(rest, overlaps, strict=True)
                if inside / max(union, 1e-6) < iou_threshold
            ]
    return sorted(kept, key=lambda n: (-scores[n], n))[:count]


# The authors' arrays.


@pytest.mark.parametrize('name', LOSSES)
def test_loss_and_gradients_are_the_authors(x64, name):
    meta, arrays, outputs = stored(name)

    def loss(outputs):
        terms = yolo.loss(outputs, arrays['boxes'], arrays['classes'], **sides(meta))
        return terms['loss'], terms

    gradients, terms = jax.jit(jax.grad(loss, has_aux=True))(outputs)
    np.testing.assert_allclose(terms['per_scale'], arrays['loss'], rtol=1e-9)
    parts = terms['box'] + terms['object'] + terms['class']
    np.testing.assert_allclose(parts, terms['loss'], rtol=1e-12)
    for i, gradient in enumerate(gradients):
        want = np.moveaxis(arrays[f'grad{i}'], 1, -1)
        np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
        # Zero where a probability is clipped, and there alone.
        np.testing.assert_array_equal(gradient == 0, want == 0)


@pytest.mark.parametrize('name', ['decode_nms', 'decode_nms_stretched'])
def test_boxes_and_detections_are_the_authors(x64, name):
    meta, arrays, outputs = stored(name)
    boxes, objects, probabilities = yolo.decode(outputs, **sides(meta))
    got = np.concatenate([boxes, objects[..., None], probabilities], -1)
    np.testing.assert_allclose(got, arrays['decoded'], rtol=1e-9, atol=1e-12)

    thresholds = {key: meta[key] for key in ('score_threshold', 'iou_threshold')}
    detect = jax.jit(lambda o: yolo.detect(o, **sides(meta), **thresholds))
    found = jax.device_get(detect(outputs))
    shape = meta['image_shape']
    if meta['letterbox']:
        corners = box_functions.from_letterbox(found['boxes'], (meta['image_size'],) * 2, shape)
    else:
        center, side = found['boxes'][..., :2], found['boxes'][..., 2:]
        corners = np.concatenate([center - side / 2, center + side / 2], -1)
        corners = corners * np.array([shape[1], shape[0]] * 2)
    for i in range(2):
        want = arrays[f'detections{i}']  # y1, x1, y2, x2, object, probability, class
        want = want[np.lexsort((-want[:, 4] * want[:, 5], want[:, 6]))]
        count = (found['classes'][i] >= 0).sum()
        assert count == len(want)
        order = np.lexsort((-found['scores'][i][:count], found['classes'][i][:count]))
        np.testing.assert_array_equal(found['classes'][i][order], want[:, 6])
        np.testing.assert_allclose(found['scores'][i][order], want[:, 4] * want[:, 5], rtol=1e-9)
        np.testing.assert_allclose(
            np.asarray(corners[i])[order], want[:, [1, 0, 3, 2]], rtol=1e-9, atol=1e-7
        )
        assert (np.diff(found['scores'][i][:count]) <= 0).all()
        assert (found['scores'][i][count:] == 0).all()
        assert (found['boxes'][i][count:] == 0).all()


# Loops, on what is drawn.


def drawn_outputs(rng, scale=1.0):
    shapes = [(2, SIZE[0] // s, SIZE[1] // s, 3 * (5 + K)) for s in (32, 16)]
    return [rng.normal(size=shape, scale=scale) for shape in shapes]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 6), ties=st.booleans())
def test_loss_is_that_of_loops(seed, count, ties):
    rng = np.random.default_rng(seed)
    outputs = drawn_outputs(rng)
    boxes, classes = np.zeros((2, 6, 4)), np.full((2, 6), -1)
    boxes[:, :count, :2] = rng.uniform(0, 1, (2, count, 2))
    boxes[:, :count, 2:] = np.exp(rng.uniform(np.log(0.02), np.log(2), (2, count, 2)))
    if ties and count:  # the same cell, the same anchor, and a centre on the border
        boxes[:, count - 1] = boxes[:, 0] * [1, 1, 1.01, 1.01]
        boxes[1, 0, 0] = 1.0
    classes[:, :count] = rng.integers(0, K, (2, count))
    with jax.enable_x64(True):
        got = jitted_loss(outputs, boxes, classes)['per_scale']
        want = loop_loss(outputs, boxes, classes, SIZE, ANCHORS, MASKS)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert jitted_loss._cache_size() == 1  # whatever the number of boxes


@jax.jit
def jitted_loss(outputs, boxes, classes):
    return yolo.loss(outputs, boxes, classes, image_size=SIZE, anchors=ANCHORS, masks=MASKS)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([0.0, 0.3, 0.9]), ties=st.booleans()
)
def test_detections_are_those_of_loops(seed, threshold, ties):
    rng = np.random.default_rng(seed)
    outputs = drawn_outputs(rng, 2.0)
    if ties:  # equal scores and equal boxes
        outputs = [np.round(x) for x in outputs]
    with jax.enable_x64(True):
        boxes, objects, probabilities = jax.device_get(
            yolo.decode(outputs, image_size=SIZE, anchors=ANCHORS, masks=MASKS)
        )
        found = jax.device_get(jitted_detect(outputs, threshold))
    for i in range(2):
        kept = loop_detect(boxes[i], objects[i], probabilities[i], threshold, 0.4, 20)
        count = len(kept)
        np.testing.assert_array_equal(
            found['classes'][i][:count], probabilities[i][kept].argmax(-1)
        )
        np.testing.assert_allclose(found['boxes'][i][:count], boxes[i][kept], rtol=1e-12)
        assert (found['classes'][i][count:] == -1).all()


@jax.jit
def jitted_detect(outputs, score_threshold):
    return yolo.detect(
        outputs,
        image_size=SIZE,
        anchors=ANCHORS,
        masks=MASKS,
        score_threshold=score_threshold,
        iou_threshold=0.4,
        max_detections=20,
    )


def test_an_overlap_of_exactly_the_threshold_drops_the_worse_box():
    # Two boxes of one cell, 16 x 16 and 16 x 32 pixels with one centre: their IoU is 1/2.
    output = np.full((1, 1, 1, 2, 6), 10.0)
    output[..., :4] = 0
    output[0, 0, 0, 1, 4] = 9  # the worse one
    settings = {'image_size': (32, 32), 'anchors': ((16, 16), (16, 32)), 'score_threshold': 0.5}
    outputs = [output.reshape(1, 1, 1, 12), np.full((1, 2, 2, 6), -10.0)]
    for threshold, count in ((0.5, 1), (0.5 + 1e-6, 2)):
        found = yolo.detect(
            [jnp.asarray(x, jnp.float32) for x in outputs],
            masks=((0, 1), (0,)),
            iou_threshold=threshold,
            **settings,
        )
        assert (found['classes'] >= 0).sum() == count


def test_a_box_of_almost_no_area_is_found_once():
    output = np.full((1, 1, 1, 1, 6), 10.0)
    output[..., :4] = (0, 0, -12, -12)
    outputs = [output.reshape(1, 1, 1, 6), np.full((1, 2, 2, 6), -10.0)]
    found = yolo.detect(
        [jnp.asarray(x, jnp.float32) for x in outputs],
        image_size=(32, 32),
        anchors=((16, 16),),
        masks=((0,), (0,)),
        score_threshold=0.5,
        iou_threshold=0.5,
    )
    assert (found['classes'] >= 0).sum() == 1


def test_padding_may_be_anywhere_and_gives_no_nan():
    rng = np.random.default_rng(0)
    outputs = [jnp.asarray(x, jnp.float32) for x in drawn_outputs(rng)]
    boxes = np.array([[[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.1, 0.5]]] * 2, np.float32)
    classes = np.array([[0, 2]] * 2, np.int32)
    spread = np.zeros((2, 5, 4), np.float32), np.full((2, 5), -1, np.int32)
    spread[0][:, [1, 3]], spread[1][:, [1, 3]] = boxes, classes
    loss = jax.value_and_grad(lambda o, *t: jitted_loss(o, *t)['loss'])
    dense, padded = loss(outputs, boxes, classes), loss(outputs, *spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), dense, padded)
    nothing = loss(outputs, spread[0], np.full((2, 5), -1, np.int32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nothing))
    assert jitted_loss(outputs, spread[0], np.full((2, 5), -1, np.int32))['box'] == 0


def test_bfloat16_is_computed_in_float32():
    outputs = [jnp.asarray(x, jnp.bfloat16) for x in drawn_outputs(np.random.default_rng(1))]
    boxes = np.array([[[0.3, 0.4, 0.2, 0.3]]] * 2, np.float32)
    classes = np.array([[1]] * 2, np.int32)
    low = jitted_loss(outputs, boxes, classes)
    wide = jitted_loss([x.astype(jnp.float32) for x in outputs], boxes, classes)
    assert low['loss'].dtype == jnp.float32
    np.testing.assert_allclose(low['loss'], wide['loss'], rtol=1e-6)


def test_a_weight_of_the_class_term_is_its_factor():
    outputs = [jnp.asarray(x, jnp.float32) for x in drawn_outputs(np.random.default_rng(2))]
    target = np.array([[[0.3, 0.4, 0.2, 0.3]]] * 2), np.array([[1]] * 2)
    settings = {'image_size': SIZE, 'anchors': ANCHORS, 'masks': MASKS}
    usual, doubled = (
        yolo.loss(outputs, *target, class_weight=w, **settings) for w in (None, 2 * K / 80)
    )
    np.testing.assert_allclose(doubled['class'], 2 * usual['class'], rtol=1e-6)
    np.testing.assert_allclose(doubled['box'], usual['box'], rtol=1e-6)


def test_the_batch_stays_where_it_is():
    mesh = sharding.make_mesh()
    on_mesh = NamedSharding(mesh, P(('data', 'fsdp')))

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((16, *shape), dtype, sharding=on_mesh)

    outputs = [spec(SIZE[0] // s, SIZE[1] // s, 3 * (5 + K)) for s in (32, 16)]
    step = jax.jit(jax.value_and_grad(lambda o, *t: jitted_loss(o, *t)['loss']))
    with jax.set_mesh(mesh):
        program = step.lower(outputs, spec(7, 4), spec(7, dtype=jnp.int32)).compile().as_text()
        detections = jitted_detect.lower(outputs, 0.1).compile().as_text()
    assert 'all-reduce' in program
    for text in (program, detections):
        assert 'all-gather' not in text
        assert 'all-to-all' not in text


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'outputs': [np.zeros((2, 2, 3, 24))]}, 'outputs'),
        ({'outputs': [np.zeros((2, 2, 3, 23)), np.zeros((2, 4, 6, 23))]}, '23'),
        ({'image_size': (128, 96)}, 'image_size'),
        ({'boxes': np.zeros((2, 3))}, 'boxes must be'),
        ({'boxes': np.zeros((3, 1, 4))}, 'boxes must be'),
        ({'classes': np.zeros((2, 2), int)}, 'classes must be'),
        ({'classes': np.zeros((2, 1))}, 'classes must be integers'),
        ({'masks': ((0, 1, 2), (3, 4, 9))}, 'masks'),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    arguments = {
        'outputs': drawn_outputs(np.random.default_rng(0)),
        'boxes': np.zeros((2, 1, 4)),
        'classes': np.zeros((2, 1), int),
        'image_size': SIZE,
        'anchors': ANCHORS,
        'masks': MASKS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        yolo.loss(**arguments)
