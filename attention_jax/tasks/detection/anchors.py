"""Anchors: which one answers for a box (`match`), and which fit a data set (`kmeans`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.functional.dtypes import statistics_type
from attention_jax.tasks.detection.boxes import overlap_ratio

Anchors = Sequence[tuple[float, float]]
Masks = Sequence[Sequence[int]]

_STARTS = 5  # the best of as many runs: k-means stops at the nearest optimum, good or bad


def match(
    boxes: jax.Array, *, image_size: tuple[int, int], anchors: Anchors, masks: Masks
) -> jax.Array:
    """The number of each box's anchor, `[b, m]`.

    Of the anchors that a scale has it is the one whose (w, h) has the largest IoU with the box's
    own, the first of equals.

    Args:
        boxes: `[b, m, 4]`, (cx, cy, w, h) over the sides of the picture.
        image_size: (h, w) of the picture in pixels.
        anchors: (w, h) of all anchors in pixels.
        masks: for each scale, the numbers of its anchors.
    """
    used = np.array(sorted({number for mask in masks for number in mask}), np.int32)
    widths, heights = np.asarray(anchors, np.float64)[used].T
    boxes = boxes.astype(statistics_type(boxes.dtype))
    origin = jnp.zeros((1, 1, 1), boxes.dtype)
    ratio = overlap_ratio(
        [origin, origin, boxes[..., 2:3] * image_size[1], boxes[..., 3:4] * image_size[0]],
        [origin, origin]
        + [jnp.asarray(side, boxes.dtype)[None, None] for side in (widths, heights)],
    )
    return jnp.asarray(used)[ratio.argmax(-1)]


def kmeans(sizes: np.ndarray, k: int = 6, seed: int = 0) -> np.ndarray:
    """Groups the sizes of boxes by overlap: Redmon and Farhadi 2017 (arXiv:1612.08242), section 2.

    The distance of two sizes is 1 - IoU of boxes with one centre; the centre of a group is the
    median of its widths and of its heights, as bubbliiiing/yolov4-tiny-pytorch has it. Of several
    random starts the one with the largest mean IoU is kept.

    Args:
        sizes: [n, 2], (w, h), in pixels of the network's input.
        k: number of anchors.
        seed: of the starts.

    Returns:
        float64 [k, 2], by rising area.

    Raises:
        ValueError: sizes that are not [n, 2] and positive, or fewer different ones than `k`; or a
            negative seed.
    """
    sizes = np.asarray(sizes, np.float64)
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f'sizes must be [n, 2], got an array of shape {sizes.shape}')
    if not (sizes > 0).all():
        raise ValueError('sizes must be positive: leave out the boxes of no area')
    different = np.unique(sizes, axis=0)
    if not 1 <= k <= len(different):
        raise ValueError(
            f'k {k} must be from 1 to the number of different sizes, which is {len(different)}'
        )
    if seed < 0:
        raise ValueError(f'seed {seed} must be at least 0')
    rng = np.random.default_rng(seed)
    best, best_fit = sizes, -1.0
    for _ in range(_STARTS):
        centers = _settle(sizes, rng.choice(different, k, replace=False))
        fit = overlap(sizes, centers).max(1).mean()
        if fit > best_fit:
            best, best_fit = centers, fit
    return best[np.argsort(best.prod(1), kind='stable')]


def overlap(sizes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """IoU [n, k] of the sizes [n, 2] and [k, 2], as boxes with one centre."""
    common = np.minimum(sizes[:, None], centers[None]).prod(-1)
    return common / (sizes.prod(1)[:, None] + centers.prod(1)[None] - common)


def _settle(sizes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Moves the centres until no size changes its group, or for 300 rounds."""
    centers = centers.copy()
    nearest = None
    for _ in range(300):
        before, nearest = nearest, overlap(sizes, centers).argmax(1)
        if before is not None and (nearest == before).all():
            break
        for j in range(len(centers)):
            group = sizes[nearest == j]
            if len(group):  # a group that lost all keeps its centre
                centers[j] = np.median(group, axis=0)
    return centers
