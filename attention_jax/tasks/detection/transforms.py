"""What happens to a picture with boxes between the source and the batch, as YOLOv4-tiny takes it.

The rules are bubbliiiing/yolov4-tiny-pytorch's. `boxes` here are float64 [m, 5]: x1, y1, x2, y2 in
pixels, and the class, which stays with its box while others are dropped. Random functions take the
generator to draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

GREY = (128, 128, 128)  # where the canvas shows no picture
ASPECT = (0.7, 1.3)  # width over height changes by the ratio of two draws from here
SCALE = (0.25, 2.0)  # longer side of a picture over the side of the canvas
MOSAIC_SCALE = (0.4, 1.0)  # the same for each of the four of a mosaic
MOSAIC_CENTER = (0.3, 0.7)  # where they meet, over each side of the canvas
GAINS = (0.1, 0.7, 0.4)  # hue, saturation and value are multiplied by 1 - gain to 1 + gain
SMALLEST = 1.0  # pixels; a box with a side of at most this, after it was cut, is dropped


class Placement(NamedTuple):
    """Where a whole picture lies on a canvas, in its pixels; it may reach beyond."""

    left: int
    top: int
    width: int
    height: int


def fit(shape: tuple[int, int], size: tuple[int, int]) -> Placement:
    """The letterbox: as large as goes into the canvas, in its middle.

    Args:
        shape: (h, w) of the picture.
        size: (h, w) of the canvas.
    """
    (h, w), (height, width) = shape, size
    scale = min(width / w, height / h)
    # Rounded down, by the same product as the network's authors: 1 pixel less in a few sizes.
    new_w, new_h = max(1, int(w * scale)), max(1, int(h * scale))
    return Placement((width - new_w) // 2, (height - new_h) // 2, new_w, new_h)


def letterbox(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture, resized by bicubic interpolation to fit `size` (h, w), on grey."""
    canvas = Image.new('RGB', size[::-1], GREY)
    paste(canvas, picture, fit((picture.height, picture.width), size))
    return canvas


def letterbox_boxes(boxes: np.ndarray, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Boxes [m, 5] of a picture of `shape` (h, w) on its letterbox of `size` (h, w)."""
    return move(boxes, shape, fit(shape, size))


def undo_letterbox(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The photo of `shape` (h, w) out of its letterbox uint8 [H, W, 3]: uint8 [h, w, 3]."""
    place = fit(shape, image.shape[:2])
    photo = Image.fromarray(
        image[place.top : place.top + place.height, place.left : place.left + place.width]
    )
    return np.asarray(photo.resize(shape[::-1], Image.Resampling.BICUBIC))


def random_placement(
    shape: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = SCALE,
) -> Placement:
    """Draws a picture's aspect and scale, and its place: inside the canvas, or covering it.

    Args:
        shape: (h, w) of the picture.
        size: (h, w) of the canvas.
        rng: to draw from.
        scale: limits of the longer side, over that side of the canvas.
    """
    height, width = size
    w, h = _random_sides(shape, size, rng, scale)
    # Larger than the canvas on a side, the free room is negative, and the picture covers it.
    return Placement(int(rng.random() * (width - w)), int(rng.random() * (height - h)), w, h)


def _random_sides(
    shape: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
) -> tuple[int, int]:
    """(width, height) of a picture whose aspect and scale are drawn."""
    aspect = shape[1] / shape[0] * rng.uniform(*ASPECT) / rng.uniform(*ASPECT)
    factor = rng.uniform(*scale)
    if aspect < 1:
        h = int(factor * size[0])
        w = int(h * aspect)
    else:
        w = int(factor * size[1])
        h = int(w / aspect)
    return max(1, w), max(1, h)


def paste(
    canvas: Image.Image,
    picture: Image.Image,
    place: Placement,
    region: tuple[int, int, int, int] | None = None,
) -> None:
    """Draws a picture, resized to its placement, into a canvas.

    Only what will be seen is resized: Pillow computes the same pixels as for the whole picture,
    since `box` does not limit what the filter reads.

    Args:
        canvas: RGB, changed in place.
        picture: RGB.
        place: of the whole picture.
        region: left, top, right, bottom of the part of the canvas that may be drawn on.
    """
    left, top, right, bottom = region or (0, 0, *canvas.size)
    left, right = max(left, place.left), min(right, place.left + place.width)
    top, bottom = max(top, place.top), min(bottom, place.top + place.height)
    if left >= right or top >= bottom:
        return
    across, down = picture.width / place.width, picture.height / place.height
    box = (
        (left - place.left) * across,
        (top - place.top) * down,
        min((right - place.left) * across, picture.width),  # not beyond it by rounding
        min((bottom - place.top) * down, picture.height),
    )
    visible = picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box)
    canvas.paste(visible, (left, top))


def move(boxes: np.ndarray, shape: tuple[int, int], place: Placement) -> np.ndarray:
    """Boxes [m, 5] of a picture of `shape` (h, w), where its placement puts them."""
    moved = boxes.copy()
    moved[:, [0, 2]] = boxes[:, [0, 2]] * (place.width / shape[1]) + place.left
    moved[:, [1, 3]] = boxes[:, [1, 3]] * (place.height / shape[0]) + place.top
    return moved


def mirror(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes [m, 5] of a picture that is `width` wide, after left and right are exchanged."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
    return mirrored


def cut(boxes: np.ndarray, region: tuple[int, int, int, int]) -> np.ndarray:
    """Cuts boxes [m, 5] at the borders of left, top, right, bottom; drops what is too small."""
    left, top, right, bottom = region
    inside = boxes.copy()
    inside[:, [0, 2]] = inside[:, [0, 2]].clip(left, right)
    inside[:, [1, 3]] = inside[:, [1, 3]].clip(top, bottom)
    sides = inside[:, 2:4] - inside[:, :2]
    return inside[(sides > SMALLEST).all(1)]


def random_scale(
    picture: Image.Image,
    boxes: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    flip: bool = True,
    scale: tuple[float, float] = SCALE,
) -> tuple[Image.Image, np.ndarray]:
    """Draws a picture at a random scale, aspect and place on grey, mirrored half of the times.

    Args:
        picture: RGB, any size.
        boxes: [m, 5] in its pixels.
        size: (h, w) of the result.
        rng: to draw from.
        flip: whether mirroring is allowed.
        scale: see `random_placement`.

    Returns:
        The canvas, and the boxes that are left on it, in its pixels.
    """
    height, width = size
    shape = (picture.height, picture.width)
    place = random_placement(shape, size, rng, scale)
    canvas = Image.new('RGB', (width, height), GREY)
    paste(canvas, picture, place)
    boxes = move(boxes, shape, place)
    if flip and rng.random() < 0.5:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = mirror(boxes, width)
    return canvas, cut(boxes, (0, 0, width, height))


def mosaic(
    examples: Sequence[tuple[Image.Image, np.ndarray]],
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    flip: bool = True,
) -> tuple[Image.Image, np.ndarray]:
    """Four pictures that meet at a drawn point: Bochkovskiy et al. 2020 (arXiv:2004.10934).

    Args:
        examples: four pictures with their boxes [m, 5]: upper left, lower left, lower right, upper
            right.
        size: (h, w) of the result.
        rng: to draw from.
        flip: whether pictures may be mirrored, each for itself.

    Returns:
        The canvas, and the boxes on it, cut at the seams.
    """
    height, width = size
    x, y = int(width * rng.uniform(*MOSAIC_CENTER)), int(height * rng.uniform(*MOSAIC_CENTER))
    canvas = Image.new('RGB', (width, height), GREY)
    kept = []
    for corner, (picture, boxes) in enumerate(examples):
        shape = (picture.height, picture.width)
        if flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = mirror(boxes, picture.width)
        w, h = _random_sides(shape, size, rng, MOSAIC_SCALE)
        on_left, on_top = corner in (0, 1), corner in (0, 3)
        place = Placement(x - w if on_left else x, y - h if on_top else y, w, h)
        region = (
            0 if on_left else x,
            0 if on_top else y,
            x if on_left else width,
            y if on_top else height,
        )
        paste(canvas, picture, place, region)
        kept.append(cut(move(boxes, shape, place), region))
    return canvas, np.concatenate(kept)


def random_colors(
    picture: Image.Image, rng: np.random.Generator, gains: tuple[float, float, float] = GAINS
) -> Image.Image:
    """Multiplies hue (on its circle), saturation and value by drawn factors.

    Args:
        picture: RGB.
        rng: to draw from.
        gains: largest change of the three factors from 1.
    """
    factors = 1 + rng.uniform(-1, 1, 3) * gains
    scaled = np.arange(256) * factors[:, None]
    scaled[0] %= 255  # Pillow's hue: 0 and 255 are one colour
    tables = np.minimum(np.rint(scaled), 255).astype(np.uint8)
    return picture.convert('HSV').point(tables.ravel().tolist()).convert('RGB')


def mixup(
    one: tuple[Image.Image, np.ndarray], other: tuple[Image.Image, np.ndarray]
) -> tuple[Image.Image, np.ndarray]:
    """The mean of two pictures of one size, with the boxes [m, 5] of both."""
    return Image.blend(one[0], other[0], 0.5), np.concatenate([one[1], other[1]])


def relative(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes [m, 4 or more] in pixels as float32 [m, 4] (cx, cy, w, h) over `size` (h, w)."""
    sides = np.array(size[::-1], np.float64)
    low, high = boxes[:, :2] / sides, boxes[:, 2:4] / sides
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)
