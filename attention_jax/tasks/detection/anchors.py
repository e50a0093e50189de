"""Anchors that fit a data set: k-means of the boxes' sizes."""

from __future__ import annotations

import numpy as np

_STARTS = 5  # the best of as many runs: k-means stops at the nearest optimum, good or bad


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
