"""Rectangles given by centre and sides: overlaps, and back to the pixels of a photo."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import statistics_type

SMALLEST = 1e-6  # what the union, the diagonal and the heights are clamped at from below

Coordinates = Sequence[jax.Array]  # cx, cy, w, h, each of any shape: they broadcast


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union.

    The union is clamped at 1e-6 from below, so two empty boxes have 0.

    Args:
        a: boxes `[..., 4]`, (cx, cy, w, h) in any unit of length.
        b: as many boxes in the same unit, or axes of 1 that broadcast.

    Returns:
        `[...]`, float32 (float64 if a box is).

    Raises:
        ValueError: not four coordinates, or shapes that do not go together.
    """
    return overlap_ratio(*_pair(a, b))


def ciou(a: jax.Array, b: jax.Array, *, stop_alpha_gradient: bool = False) -> jax.Array:
    """Complete IoU (arXiv 1911.08287): overlap, distance of the centres, difference of the shapes.

    `CIoU = IoU - d / c - alpha v`: d is the squared distance of the centres, c the squared diagonal
    of the box around both, `v = 4 / pi^2 (atan(wa / ha) - atan(wb / hb))^2` and
    `alpha = v / (1 - IoU + v)`. Denominators are clamped at 1e-6 from below, so the unit matters
    for boxes that small. Clamps and the gradient through alpha are those of
    bubbliiiing/yolov4-tiny-pytorch at 1bbb2f28.

    Args:
        a: boxes `[..., 4]`, (cx, cy, w, h) in any unit of length.
        b: as many boxes in the same unit, or axes of 1 that broadcast.
        stop_alpha_gradient: takes alpha as a constant, as the paper's authors do.

    Returns:
        `[...]`, at most 1, float32 (float64 if a box is).

    Raises:
        ValueError: not four coordinates, or shapes that do not go together.
    """
    a, b = _pair(a, b)
    ratio = overlap_ratio(a, b)
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    distance = jnp.square(ax - bx) + jnp.square(ay - by)
    around = [jnp.maximum(*_ends(a, b, i, 1)) - jnp.minimum(*_ends(a, b, i, -1)) for i in (0, 1)]
    diagonal = jnp.square(around[0]) + jnp.square(around[1])
    angles = [jnp.arctan(w / jnp.maximum(h, SMALLEST)) for w, h in ((aw, ah), (bw, bh))]
    v = 4 / np.pi**2 * jnp.square(angles[0] - angles[1])
    alpha = v / jnp.maximum(1 - ratio + v, SMALLEST)
    if stop_alpha_gradient:
        alpha = jax.lax.stop_gradient(alpha)
    return ratio - distance / jnp.maximum(diagonal, SMALLEST) - alpha * v


def overlap_ratio(a: Coordinates, b: Coordinates) -> jax.Array:
    """`iou` of boxes whose four coordinates are separate arrays, which broadcast."""
    intersection, union = overlap(a, b)
    return intersection / jnp.maximum(union, SMALLEST)


def overlap(a: Coordinates, b: Coordinates) -> tuple[jax.Array, jax.Array]:
    """Areas of intersection and union of boxes whose four coordinates are separate arrays.

    Coordinates apart keep an axis of 4 from being the last one, which a TPU fills up to 128.

    Args:
        a: cx, cy, w, h.
        b: the same; all broadcast.

    Returns:
        two arrays of the shape that all broadcast to, in the unit squared.
    """
    sides = [jnp.minimum(*_ends(a, b, i, 1)) - jnp.maximum(*_ends(a, b, i, -1)) for i in (0, 1)]
    intersection = jnp.maximum(sides[0], 0) * jnp.maximum(sides[1], 0)
    return intersection, a[2] * a[3] + b[2] * b[3] - intersection


def from_letterbox(
    boxes: jax.Array, image_size: tuple[int, int], shape: jax.Array | tuple[int, int]
) -> jax.Array:
    """Boxes on a letterboxed picture as corners on the photo it was made of.

    A photo of `shape` (h, w) fills, in the middle of a picture of size S, the part
    `new = round(shape min(S / shape))`. So a centre c, relative to S, becomes
    `(c - (S - new) / 2 / S) S / new` and a side s `s S / new`, relative to the photo. Boxes are not
    cut at its borders.

    Args:
        boxes: `[..., 4]`, (cx, cy, w, h) over the sides of the letterboxed picture.
        image_size: (h, w) of that picture, in pixels.
        shape: (h, w) of the photo in pixels, `[2]` or `[..., 2]` that broadcasts over the boxes:
            `[b, 1, 2]` for boxes `[b, n, 4]`.

    Returns:
        `[..., 4]`, (x1, y1, x2, y2) in pixels of the photo, float32 (float64 if the boxes are).

    Raises:
        ValueError: boxes without four coordinates, or a shape that does not go with them.
    """
    boxes, shape = jnp.asarray(boxes), jnp.asarray(shape)
    if boxes.shape[-1:] != (4,):
        raise ValueError(f'boxes must be [..., 4], got shape {boxes.shape}')
    whole = (*boxes.shape[:-1], 2)
    if shape.shape != (2,) and (
        shape.ndim != boxes.ndim
        or any(s not in (1, n) for s, n in zip(shape.shape[:-1], whole[:-1], strict=True))
        or shape.shape[-1] != 2
    ):
        raise ValueError(
            f'shape must be (h, w), or {list(whole)} with axes of 1 that broadcast, for boxes of '
            f'shape {boxes.shape}, got an array of shape {shape.shape}'
        )
    boxes = boxes.astype(statistics_type(boxes.dtype))
    photo = shape[..., ::-1].astype(boxes.dtype)  # (w, h), as coordinates are
    photo = expand_to(photo, boxes)
    size = expand_to(jnp.asarray(image_size[::-1], boxes.dtype), boxes)
    # For each side the smaller of two quotients of whole numbers, so that halves round alike in
    # every precision.
    fits = [photo * size[..., i : i + 1] / photo[..., i : i + 1] for i in (0, 1)]
    new = jnp.maximum(jnp.round(jnp.minimum(*fits)), 1)
    scale = size / new
    centre = (boxes[..., :2] - (size - new) / 2 / size) * scale
    half = boxes[..., 2:] * scale / 2
    return jnp.concatenate([(centre - half) * photo, (centre + half) * photo], -1)


def _pair(a: jax.Array, b: jax.Array) -> tuple[Coordinates, Coordinates]:
    """The coordinates of both, in the type that is computed in."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    for name, boxes in (('a', a), ('b', b)):
        if boxes.shape[-1:] != (4,):
            raise ValueError(
                f'{name} must be boxes [..., 4] of (cx, cy, w, h), got shape {boxes.shape}'
            )
    if a.ndim != b.ndim or any(
        m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape, strict=True)
    ):
        raise ValueError(
            f'a and b must have as many axes, equal or 1, got shapes {a.shape} and {b.shape}'
        )
    wide = statistics_type(jnp.promote_types(a.dtype, b.dtype))
    a, b = a.astype(wide), b.astype(wide)
    return [a[..., i] for i in range(4)], [b[..., i] for i in range(4)]


def _ends(a: Coordinates, b: Coordinates, axis: int, sign: int) -> tuple[jax.Array, jax.Array]:
    """The left (sign -1) or right borders of both boxes along x (axis 0) or y."""
    return tuple(box[axis] + sign * box[axis + 2] / 2 for box in (a, b))
