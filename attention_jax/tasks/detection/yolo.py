"""What YOLOv4-tiny does with its outputs: boxes, the loss, the detections that remain.

Semantics of bubbliiiing/yolov4-tiny-pytorch at 1bbb2f28, over whole batches in fixed shapes: any
number of objects runs the same program. A scale's output is `[b, h, w, anchors (5 + classes)]`,
the channels of an anchor in the order x, y, w, h, object, classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from attention_jax import checks
from attention_jax.functional.dtypes import statistics_type
from attention_jax.functional.sharding import per_example
from attention_jax.tasks.detection.anchors import Anchors, Masks, match
from attention_jax.tasks.detection.boxes import ciou, overlap, overlap_ratio

BALANCE = {32: 0.4, 16: 1.0}  # weight of the object term at each stride
# A probability clipped to [1e-7, 1 - 1e-7] is the sigmoid of a logit clipped to this.
LARGEST_LOGIT = float(np.log((1 - 1e-7) / 1e-7))


class Scale(NamedTuple):
    """One output and what its cells mean; n counts anchors, rows and columns, in this order."""

    output: jax.Array  # [b, h, w, a, 5 + k]
    anchors: np.ndarray  # [a, 2], (w, h) in pixels
    mask: np.ndarray  # [a], their numbers among all anchors
    stride: int

    def boxes(self) -> list[jax.Array]:
        """cx, cy, w, h of all predictions in cells, each `[b, n]`."""
        _, rows, columns, _, _ = self.output.shape
        x, y, w, h = (_widened(self.output[..., i]) for i in range(4))  # [b, h, w, a]
        column = np.arange(columns)[None, None, :, None]
        row = np.arange(rows)[None, :, None, None]
        widths, heights = (self.anchors / self.stride).T
        centres = (
            jax.nn.sigmoid(v) + jnp.asarray(at, v.dtype) for v, at in ((x, column), (y, row))
        )
        sides = (
            jnp.exp(v) * jnp.asarray(side, v.dtype)[None, None, None]
            for v, side in ((w, widths), (h, heights))
        )
        return [rearrange(v, 'b h w a -> b (a h w)') for v in (*centres, *sides)]

    def logits(self, channels: slice) -> jax.Array:
        """Channels of all predictions, `[b, n, c]`."""
        return rearrange(_widened(self.output[..., channels]), 'b h w a c -> b (a h w) c')


def decode(
    outputs: Sequence[jax.Array],
    *,
    image_size: tuple[int, int],
    anchors: Anchors,
    masks: Masks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The boxes that the outputs stand for.

    In the cell of column i and row j with anchor (aw, ah):
    `cx = (sigmoid(x) + i) / columns`, `cy = (sigmoid(y) + j) / rows`, `w = exp(w) aw / S_w`,
    `h = exp(h) ah / S_h`; object and classes are sigmoids.

    Args:
        outputs: a network's, `[b, h, w, a (5 + k)]` for each scale, stride 32 first.
        image_size: S, (h, w) of the network's input in pixels.
        anchors: (w, h) of all anchors in pixels.
        masks: for each scale, the numbers of its a anchors.

    Returns:
        boxes `[b, n, 4]`, (cx, cy, w, h) over the sides of the picture, objectness `[b, n]` and
        probabilities of the classes `[b, n, k]`; n runs over scales, anchors, rows and columns.
        float32, or float64 if the outputs are.

    Raises:
        ValueError: outputs, image_size, anchors and masks that do not go together.
    """
    rows = []
    for scale in _scales(outputs, image_size, anchors, masks):
        h, w = scale.output.shape[1:3]
        coordinates = [c / side for c, side in zip(scale.boxes(), (w, h, w, h), strict=True)]
        probabilities = jax.nn.sigmoid(scale.logits(slice(4, None)))
        rows.append((jnp.stack(coordinates, -1), probabilities))
    boxes, probabilities = (jnp.concatenate(parts, 1) for parts in zip(*rows, strict=True))
    return boxes, probabilities[..., 0], probabilities[..., 1:]


def loss(
    outputs: Sequence[jax.Array],
    boxes: jax.Array,
    classes: jax.Array,
    *,
    image_size: tuple[int, int],
    anchors: Anchors,
    masks: Masks,
    ignore_threshold: float = 0.5,
    class_weight: float | None = None,
) -> dict[str, jax.Array]:
    """The loss of YOLOv4-tiny, summed over the scales.

    A box belongs to the anchor of some scale whose (w, h) has the largest IoU with its own, the
    first of equals. At each scale that has the anchor, the prediction of that anchor in the cell
    of the box's centre answers for it. Of boxes with the same prediction the last one gives the
    coordinates, all give their classes. With n answering predictions in the whole batch and BCE on
    probabilities clipped to [1e-7, 1 - 1e-7]:

    - box: `0.05 mean_n(1 - CIoU)`, in units of cells;
    - class: `class_weight mean_{n k} BCE`; both are 0 if nothing answers;
    - object: `5 balance S_h S_w / 416^2 mean BCE`, balance 0.4 at stride 32 and 1 at stride 16,
      without the predictions that answer for nothing and have an IoU above `ignore_threshold` with
      a box of the image.

    Args:
        outputs: a network's, `[b, h, w, a (5 + k)]` for each scale, stride 32 first.
        boxes: `[b, m, 4]`, (cx, cy, w, h) over the sides of the picture. A centre on the right or
            lower border is in the last cell.
        classes: `[b, m]`, integers below k; -1 is padding, anywhere among the boxes.
        image_size: S, (h, w) of the network's input in pixels.
        anchors: (w, h) of all anchors in pixels.
        masks: for each scale, the numbers of its a anchors.
        ignore_threshold: see above.
        class_weight: see above; None is the repository's k / 80.

    Returns:
        'loss', the sum of 'box', 'object' and 'class', each summed over the scales, and 'per_scale'
        `[scales]`; float32, or float64 if the outputs are.

    Raises:
        ValueError: arguments that do not go together.
    """
    scales = _scales(outputs, image_size, anchors, masks)
    boxes, classes = jnp.asarray(boxes), jnp.asarray(classes)
    batch = len(outputs[0])
    if boxes.ndim != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4:
        raise ValueError(
            f'boxes must be [{batch}, m, 4] for these outputs, got shape {boxes.shape}'
        )
    if classes.shape != boxes.shape[:2] or not jnp.issubdtype(classes.dtype, jnp.integer):
        raise ValueError(
            f'classes must be integers {list(boxes.shape[:2])} for boxes {list(boxes.shape)}, '
            f'got {classes.dtype} of shape {classes.shape}'
        )
    best = match(boxes, image_size=image_size, anchors=anchors, masks=masks)
    terms = [
        _scale_loss(s, boxes, classes, best, image_size, ignore_threshold, class_weight)
        for s in scales
    ]
    totals = {name: sum(t[name] for t in terms) for name in ('box', 'object', 'class')}
    per_scale = jnp.stack([t['box'] + t['object'] + t['class'] for t in terms])
    return {'loss': per_scale.sum(), **totals, 'per_scale': per_scale}


def detect(
    outputs: Sequence[jax.Array],
    *,
    image_size: tuple[int, int],
    anchors: Anchors,
    masks: Masks,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int = 300,
) -> dict[str, jax.Array]:
    """The best detections of each picture after non-maximum suppression, class by class.

    The score is objectness times the probability of the best class, the first of equals. The best
    remaining box is kept, and those of its class with an IoU of at least `iou_threshold` with it
    are dropped, until none is left or `max_detections` are kept: exactly the best of what greedy
    suppression of each class keeps. Costs `max_detections n` overlaps at most, fewer where nothing
    is left in any picture, and never an n x n array.

    Args:
        outputs: a network's, `[b, h, w, a (5 + k)]` for each scale, stride 32 first.
        image_size: (h, w) of the network's input in pixels.
        anchors: (w, h) of all anchors in pixels.
        masks: for each scale, the numbers of its a anchors.
        score_threshold: lowest score that counts (0.001 to measure, 0.5 to look at).
        iou_threshold: overlap from which two boxes of a class are one object (0.5 to measure, 0.3
            to look at).
        max_detections: d, most detections of a picture.

    Returns:
        'boxes' `[b, d, 4]`, (cx, cy, w, h) over the sides of the picture, 'scores' `[b, d]`,
        falling, and 'classes' `[b, d]`, int32. What is left of d is padding: class -1, score 0,
        box 0. float32, or float64 if the outputs are.

    Raises:
        ValueError: outputs, image_size, anchors and masks that do not go together, or a
            max_detections below 1.
    """
    checks.at_least('max_detections', max_detections, 1)
    boxes, objectness, probabilities = decode(
        outputs, image_size=image_size, anchors=anchors, masks=masks
    )
    scores = objectness * probabilities.max(-1)
    scores = jnp.where(scores >= score_threshold, scores, -1)
    classes = probabilities.argmax(-1).astype(jnp.int32)

    def select(candidates: Any) -> jax.Array:
        return _suppress(*candidates, iou_threshold, max_detections)

    # Devices differ in how long they take: none waits for another inside the loop.
    kept = per_example(select)((boxes, scores, classes))
    found, index = kept >= 0, jnp.maximum(kept, 0)
    return {
        'boxes': jnp.where(
            found[..., None], jnp.take_along_axis(boxes, index[..., None], axis=1), 0
        ),
        'scores': jnp.where(found, jnp.take_along_axis(scores, index, axis=1), 0),
        'classes': jnp.where(found, jnp.take_along_axis(classes, index, axis=1), -1),
    }


def _suppress(
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    iou_threshold: float,
    max_detections: int,
) -> jax.Array:
    """Numbers of the boxes that are kept, `[b, d]`, by falling score; -1 where there are no more.

    A score below 0 marks a box that is no candidate.
    """
    coordinates = [boxes[..., i] for i in range(4)]
    place = lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def more(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        step, scores, _ = state
        return (step < max_detections) & (scores >= 0).any()

    def keep_one(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        step, scores, kept = state
        best = scores.argmax(-1).astype(jnp.int32)[:, None]

        def of_best(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, best, axis=1)

        ratio = overlap_ratio([of_best(c) for c in coordinates], coordinates)
        same = (classes == of_best(classes)) & (ratio >= iou_threshold)
        kept = kept.at[:, step].set(jnp.where(of_best(scores) >= 0, best, -1)[:, 0])
        # A box too small for the clamp of the union overlaps not even itself.
        return step + 1, jnp.where(same | (place == best), -1, scores), kept

    kept = jnp.full((len(scores), max_detections), -1, jnp.int32)
    return lax.while_loop(more, keep_one, (jnp.int32(0), scores, kept))[2]


def _scale_loss(
    scale: Scale,
    boxes: jax.Array,
    classes: jax.Array,
    best: jax.Array,
    image_size: tuple[int, int],
    ignore_threshold: float,
    class_weight: float | None,
) -> dict[str, jax.Array]:
    """The weighted terms of one scale; `best` `[b, m]` is each box's anchor among all."""
    _, rows, columns, _, channels = scale.output.shape
    wide = statistics_type(scale.output.dtype)
    k = channels - 5
    real = classes >= 0
    cells = jnp.asarray([columns, rows] * 2, wide)
    boxes = jnp.where(real[..., None], boxes.astype(wide), 0) * cells[None, None]
    column, row = (
        jnp.clip(jnp.floor(boxes[..., i]).astype(jnp.int32), 0, last)
        for i, last in ((0, columns - 1), (1, rows - 1))
    )
    matches = best[..., None] == scale.mask[None, None]  # [b, m, a]
    which = matches.argmax(-1).astype(jnp.int32)
    slot = (which * rows + row) * columns + column
    slot = jnp.where(real & matches.any(-1), slot, -1)

    # Boxes with the same slot, compared each with each: no order of writing decides.
    same = (slot[:, :, None] == slot[:, None]) & (slot >= 0)[:, None]  # [b, m, m]
    later = np.triu(np.ones(same.shape[1:], bool), 1)
    answered = (slot >= 0) & ~(same & later[None]).any(-1)
    count = answered.sum().astype(wide)
    wanted = (classes[..., None] == np.arange(k, dtype=np.int32)[None, None]).astype(wide)
    wanted = jnp.minimum(same.astype(wide) @ wanted, 1)

    # What answers, [b, m, 5 + k]. Elsewhere zeros: nothing there can reach the gradient.
    pixels = jax.vmap(lambda x, i, j: x.at[i, j].get(mode='promise_in_bounds'))(
        scale.output, row, column
    )
    chosen = answered[..., None] & (which[..., None] == np.arange(len(scale.mask))[None, None])
    answers = jnp.where(chosen[..., None], _widened(pixels), 0).sum(2)
    size = scale.anchors / scale.stride
    size = jnp.where(chosen[..., None], jnp.asarray(size, wide)[None, None], 0).sum(2)
    centre = jax.nn.sigmoid(answers[..., :2]) + jnp.stack([column, row], -1).astype(wide)
    predicted = jnp.concatenate([centre, jnp.exp(answers[..., 2:4]) * size], -1)
    box = jnp.where(answered, 1 - ciou(predicted, boxes), 0).sum() / jnp.maximum(count, 1)
    entropy = jnp.where(answered[..., None], _cross_entropy(answers[..., 5:], wanted), 0)
    kind = entropy.sum() / (jnp.maximum(count, 1) * k)

    candidates = [lax.stop_gradient(c)[:, None] for c in scale.boxes()]
    intersection, union = overlap(
        candidates, [boxes[..., i : i + 1] for i in range(4)]
    )  # [b, m, n]
    # The quotient without a guard: an empty box has no IoU, and that is not above.
    near = (intersection > ignore_threshold * union).any(1)
    number = np.arange(near.shape[1], dtype=np.int32)
    answering = (slot[..., None] == number[None, None]).any(1)
    counted = answering | ~near
    entropy = _cross_entropy(scale.logits(slice(4, 5))[..., 0], answering.astype(wide))
    thing = jnp.where(counted, entropy, 0).sum() / jnp.maximum(counted.sum().astype(wide), 1)
    weight = 5 * BALANCE[scale.stride] * image_size[0] * image_size[1] / 416**2
    class_weight = k / 80 if class_weight is None else class_weight
    return {'box': 0.05 * box, 'object': weight * thing, 'class': class_weight * kind}


def _cross_entropy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """BCE of probabilities clipped to [1e-7, 1 - 1e-7], which have no gradient where clipped."""
    logits = lax.clamp(-LARGEST_LOGIT, logits, LARGEST_LOGIT)
    return jax.nn.softplus(logits) - wanted * logits


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(statistics_type(x.dtype))


def _scales(
    outputs: Sequence[jax.Array], image_size: tuple[int, int], anchors: Anchors, masks: Masks
) -> list[Scale]:
    """The outputs with their anchors apart, once all is found to go together."""
    anchors = np.asarray(anchors, np.float64)
    if anchors.ndim != 2 or anchors.shape[1] != 2 or not (anchors > 0).all():
        raise ValueError(f'anchors must be pairs (w, h) of positive pixels, got {anchors.tolist()}')
    if len(outputs) != len(masks):
        raise ValueError(
            f'outputs must be one array for each of the {len(masks)} masks, got {len(outputs)}'
        )
    if len(image_size) != 2:
        raise ValueError(f'image_size must be (h, w), got {image_size}')
    scales: list[Scale] = []
    for i, (output, mask) in enumerate(zip(outputs, masks, strict=True)):
        mask = np.asarray(mask, np.int32)
        if mask.ndim != 1 or not mask.size or mask.min() < 0 or mask.max() >= len(anchors):
            raise ValueError(
                f'masks[{i}] must be numbers of anchors from 0 to {len(anchors) - 1}, '
                f'got {mask.tolist()}'
            )
        if output.ndim != 4 or not jnp.issubdtype(output.dtype, jnp.floating):
            raise ValueError(
                f'outputs[{i}] must be a floating array [b, h, w, c], '
                f'got {output.dtype} of shape {output.shape}'
            )
        b, h, w, c = output.shape
        if c % len(mask) or c // len(mask) < 6:
            raise ValueError(
                f'outputs[{i}] must have {len(mask)} * (5 + classes) channels for masks[{i}] = '
                f'{mask.tolist()}, got {c}'
            )
        if scales and (b, c // len(mask)) != (len(outputs[0]), scales[0].output.shape[-1]):
            raise ValueError(
                f'outputs must have one batch and one number of classes, got shapes '
                f'{[o.shape for o in outputs]}'
            )
        strides = [s for s in BALANCE if (h * s, w * s) == tuple(image_size)]
        if not strides:
            raise ValueError(
                f'image_size {tuple(image_size)} must be {" or ".join(map(str, BALANCE))} times '
                f'the {h} x {w} cells of outputs[{i}]'
            )
        split = rearrange(output, 'b h w (a c) -> b h w a c', a=len(mask))
        scales.append(Scale(split, anchors[mask], mask, strides[0]))
    return scales
