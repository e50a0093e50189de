"""What happens to a picture between the source and the batch: NumPy and Pillow, uint8 throughout.

Random functions take their draws, or the generator to draw from, as an argument: the loader
decides what they depend on.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

PADDING = 4  # pixels on each side, of 32: He et al. 2016 (arXiv:1512.03385), section 4.2
CROP_AREA = (0.08, 1.0)  # fraction of the picture: Szegedy et al. 2015 (arXiv:1409.4842), section 6
CROP_ASPECT = (3 / 4, 4 / 3)  # width over height, the same section
EVAL_CROP = 224 / 256  # side of the centre crop over the shorter side before it


def resize_and_crop(
    picture: Image.Image,
    size: tuple[int, int],
    ratio: float = 1.0,
    interpolation: str = 'bilinear',
) -> Image.Image:
    """Resizes so that `ratio` times `size` is just covered, then crops the centre.

    For a square `size` the shorter side becomes `ratio` times it: with `1 / EVAL_CROP` the usual
    evaluation on ImageNet (224 out of 256). With anti-aliasing, as Pillow does it.

    Args:
        picture: any size.
        size: (height, width) of the result.
        ratio: at least 1.
        interpolation: Pillow's name of the filter, in small letters.
    """
    height, width = size
    scale = max(ratio * height / picture.height, ratio * width / picture.width)
    # The side that decides comes out exact; rounding can never leave less than the crop needs.
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling[interpolation.upper()])
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop.

    Its area is uniform in `CROP_AREA` of the picture's, the logarithm of its aspect uniform in
    `CROP_ASPECT`'s. After ten draws that do not fit, the largest central box of allowed aspect
    (the rule of torchvision's `RandomResizedCrop`).

    Returns:
        left, top, right, bottom in pixels, inside the picture.
    """
    low, high = CROP_ASPECT
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    picture: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    interpolation: str = 'bilinear',
) -> Image.Image:
    """A random box of the picture (`random_box`), resized to `size` (height, width)."""
    box = random_box(picture.height, picture.width, rng)
    return picture.crop(box).resize(size[::-1], Image.Resampling[interpolation.upper()])


def pad_crop(
    images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, padding: int = PADDING
) -> np.ndarray:
    """Pads with black, crops a window of the old size, mirrors some: a whole batch at once.

    Args:
        images: uint8 [b, h, w, c].
        offsets: int [b, 2], (down, right) of each window in the padded picture, 0 .. 2 padding.
        flips: bool [b], True mirrors left and right after the crop.
        padding: pixels on each side.

    Returns:
        uint8 [b, h, w, c].
    """
    b, h, w, c = images.shape
    padded = np.zeros((b, h + 2 * padding, w + 2 * padding, c), images.dtype)
    padded[:, padding : padding + h, padding : padding + w] = images
    # Columns and channels as one axis: a window is then h runs of w * c bytes, and one gather
    # copies them all, three times as fast as indexing pixels.
    windows = np.lib.stride_tricks.sliding_window_view(
        padded.reshape(b, h + 2 * padding, -1), (h, w * c), axis=(1, 2)
    )
    cropped = windows[np.arange(b), offsets[:, 0], offsets[:, 1] * c].reshape(b, h, w, c)
    cropped[flips] = cropped[flips, :, ::-1]
    return cropped
