"""`digit_scenes`: handwritten digits at drawn places, with exact boxes; no files.

The digits are scikit-learn's (UCI optical recognition of handwritten digits, 8x8 pixels of 0..16).
Everything is integer arithmetic on draws of NumPy's frozen `RandomState`, so that the pictures are
the same, bit for bit, on every machine and with every version of what is used.
"""

from __future__ import annotations

import functools

import numpy as np

SIZE = 128  # pixels a side of a scene
COUNTS = {'train': 1000, 'test': 250}
CLASS_NAMES = tuple('0123456789')

_SIDES = (12, 56)  # pixels, of the longer side of a box
_MOST = 8  # digits of a scene
_EMPTY = 32  # one scene in so many has none
_COVERED = 0.25  # share of the smaller of two boxes that the other may cover: IoU at most 1 / 7
_TRIES = 20  # places tried for a digit before it is left out
_FAINT = 4  # of 16: strokes below this are background, so that the edge of a box shows


def draw(split: str) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Draws all scenes of a split.

    A scene has 1 to 8 digits, or none (one in 32), on a smooth ground of colours with noise, dark
    digits on light or light on dark. The digits of the test scenes, every fifth of the 1,797, are
    in no training scene. A box is tight around the pixels that a digit changes; its longer side is
    12 to 56 pixels; of two boxes' smaller one at most a quarter is covered.

    Args:
        split: 'train' or 'test'.

    Returns:
        uint8 [n, 128, 128, 3]; boxes of each, float32 [m, 4] (x1, y1, x2, y2) in pixels, the
        corners of the first pixel and behind the last; classes of each, int32 [m].
    """
    strokes, labels = _digits(split)
    # Not np.random.default_rng: NumPy may change the draws of a Generator between versions.
    rng = np.random.RandomState(list(COUNTS).index(split))
    images, boxes, classes = [], [], []
    for _ in range(COUNTS[split]):
        image, scene_boxes, chosen = _scene(strokes, rng)
        images.append(image)
        boxes.append(np.array(scene_boxes, np.float32).reshape(-1, 4))
        classes.append(labels[chosen].astype(np.int32))
    return np.stack(images), boxes, classes


def _digits(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The digits of a split, cut to their strokes: ints 0 or 4..16; and what they are."""
    from sklearn.datasets import load_digits  # over a second to import

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 4) == (split == 'test')
    strokes = []
    for image in digits.images[chosen].astype(np.int64):
        image = np.where(image < _FAINT, 0, image)
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        strokes.append(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return strokes, digits.target[chosen]


def _scene(
    strokes: list[np.ndarray], rng: np.random.RandomState
) -> tuple[np.ndarray, list[tuple[int, int, int, int]], list[int]]:
    """One picture, its boxes, and which digits they hold."""
    count = 0 if rng.randint(_EMPTY) == 0 else rng.randint(1, _MOST + 1)
    image, light = _ground(rng)
    boxes: list[tuple[int, int, int, int]] = []
    chosen: list[int] = []
    for _ in range(count):
        which, side = rng.randint(len(strokes)), rng.randint(_SIDES[0], _SIDES[1] + 1)
        rows, columns = strokes[which].shape
        longer = max(rows, columns)
        h, w = (max(1, (2 * side * n + longer) // (2 * longer)) for n in (rows, columns))
        ink = rng.randint(0, 80, 3) if light else rng.randint(176, 256, 3)
        for _ in range(_TRIES):
            x, y = rng.randint(SIZE - w + 1), rng.randint(SIZE - h + 1)
            box = (x, y, x + w, y + h)
            if all(_covered(box, other) <= _COVERED for other in boxes):
                break
        else:
            continue
        # 0..255; below a tenth it would be box without ink, above it is never at the edge.
        alpha = (_enlarge(strokes[which], (h, w)) * 255 + 8) // 16
        alpha[alpha < 25] = 0
        alpha = alpha[..., None]
        part = image[y : y + h, x : x + w]
        part[:] = (part * (255 - alpha) + ink * alpha + 127) // 255
        boxes.append(box)
        chosen.append(which)
    return image.astype(np.uint8), boxes, chosen


def _ground(rng: np.random.RandomState) -> tuple[np.ndarray, bool]:
    """A background int [128, 128, 3] of four drawn colours, one a corner, with noise."""
    light = bool(rng.randint(2))
    level = rng.randint(170, 226) if light else rng.randint(30, 86)
    corners = level + rng.randint(-25, 26, (2, 2, 3))
    ground = np.stack([_enlarge(c, (SIZE, SIZE)) for c in np.moveaxis(corners, -1, 0)], -1)
    return ground + rng.randint(-5, 6, ground.shape), light


def _covered(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Which share of the smaller box the larger one covers."""
    w = min(box[2], other[2]) - max(box[0], other[0])
    h = min(box[3], other[3]) - max(box[1], other[1])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return max(0, w) * max(0, h) / min(areas)


def _enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing of int [h, w], centres aligned, in whole numbers, rounded down."""
    (rows, row_unit), (columns, column_unit) = map(_weights, image.shape, size)
    return rows @ image @ columns.T // (row_unit * column_unit)


@functools.cache
def _weights(inputs: int, outputs: int) -> tuple[np.ndarray, int]:
    """Integer weights [outputs, inputs] of bilinear resizing, and what each row sums to."""
    unit = 2 * outputs
    place = (2 * np.arange(outputs) + 1) * inputs - outputs  # in 1 / unit of an input pixel
    low, part = np.divmod(np.clip(place, 0, unit * (inputs - 1)), unit)
    weights = np.zeros((outputs, inputs), np.int64)
    weights[np.arange(outputs), low] = unit - part
    weights[np.arange(outputs), np.minimum(low + 1, inputs - 1)] += part
    return weights, unit
