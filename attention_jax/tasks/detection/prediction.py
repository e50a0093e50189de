"""Boxes on photos: detecting them in one, and drawing them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps

from attention_jax.data.transforms import convert, to_array
from attention_jax.modules.static import Static
from attention_jax.tasks.detection import boxes, transforms, yolo
from attention_jax.tasks.task import Batch, Measured

# Okabe and Ito's colours, which people who confuse red and green can tell apart as well.
_COLORS = ('#E69F00', '#56B4E9', '#009E73', '#F0E442', '#0072B2', '#D55E00', '#CC79A7')
_DARK = ('#0072B2', '#D55E00')
_SAMPLES = 4  # pictures with boxes that an evaluation shows
_SAMPLE_SCORE = 0.3  # of the least certain box drawn there


def predict(
    model: nn.Module,
    variables: Mapping[str, Any],
    image: np.ndarray | Image.Image,
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.3,
    max_detections: int = 300,
) -> dict[str, np.ndarray]:
    """Detects objects in one photo; the photo is letterboxed to the network's size.

    The program is compiled at the first photo and kept for the next ones.

    Args:
        model: a network that detects, such as `create_model('yolov4_tiny')`.
        variables: its variables.
        image: uint8 `[h, w, 3]`, or a Pillow picture, which is turned upright as its camera says.
        score_threshold: of the least certain box returned.
        iou_threshold: of two boxes of a class from which on only the better one is returned.
        max_detections: at most so many boxes, the best.

    Returns:
        'boxes' float32 `[d, 4]`, (x1, y1, x2, y2) in pixels of the upright photo, cut at its
        borders; 'scores' float32 `[d]`, falling; 'classes' int32 `[d]`.

    Raises:
        ValueError: a network that does not detect, or an image of another kind.
    """
    if not hasattr(model, 'anchors') or not model.num_classes:
        raise ValueError(
            f'model {type(model).__name__} does not detect: use a yolov4_tiny with num_classes'
        )
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f'image must be uint8 [h, w, 3] or a Pillow picture, got {image.dtype} '
                f'{list(image.shape)}'
            )
        image = Image.fromarray(image)
    image = upright(image)
    canvas = to_array(transforms.letterbox(image, tuple(model.image_size)))
    found = _detect(
        Static(model),
        variables,
        canvas,
        np.array([image.height, image.width]),
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )
    found = jax.device_get(found)
    found['boxes'] = found['boxes'].clip(0, np.float32([*image.size, *image.size]))
    there = found['classes'] >= 0
    return {key: value[there] for key, value in found.items()}


def draw(
    photo: Image.Image | np.ndarray,
    found: Mapping[str, np.ndarray],
    class_names: Sequence[str] = (),
) -> Image.Image:
    """Draws boxes with names and scores on a copy of a photo.

    Args:
        photo: as for `predict`.
        found: what `predict` returns; the best are drawn last, on top, and names above all boxes.
        class_names: one a class; numbers are written for those that are missing, and for names
            that are not ASCII, whose letters the font has not.

    Returns:
        The picture, RGB.
    """
    picture = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    picture = upright(picture)
    pen = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = max(1, round(side / 200))
    font = ImageFont.load_default(size=max(9, round(side / 28)))
    order = np.argsort(found['scores'], kind='stable')
    for i in order:
        left, top, right, bottom = (float(v) for v in found['boxes'][i])
        corners = (left, top, max(left, right), max(top, bottom))
        pen.rectangle(corners, outline=_color(found['classes'][i])[0], width=line)
    for i in order:
        left, top, _, _ = (float(v) for v in found['boxes'][i])
        number = int(found['classes'][i])
        known = number < len(class_names) and class_names[number].isascii()
        text = f'{class_names[number] if known else number} {found["scores"][i]:.2f}'
        _, _, width, height = pen.textbbox((0, 0), text, font=font)
        # Above the box, or inside it where the photo ends; never beyond the right border.
        x = min(max(0.0, left), max(0.0, picture.width - width - 2.0))
        y = top - height - 2 if top > height + 2 else max(0.0, top)
        color, ink = _color(number)
        pen.rectangle((x, y, x + width + 2, y + height + 2), fill=color)
        pen.text((x + 1, y), text, fill=ink, font=font)
    return picture


def samples(batch: Batch, measured: Measured, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the first photos of a batch with the boxes that were detected in them."""
    drawn = {}
    for number, i in enumerate(np.flatnonzero(batch['mask'] > 0)[:_SAMPLES]):
        shown = measured['scores'][i] >= _SAMPLE_SCORE
        photo = transforms.undo_letterbox(batch['image'][i], tuple(batch['shape'][i].tolist()))
        found = {key: measured[key][i][shown] for key in ('boxes', 'scores', 'classes')}
        drawn[f'detections/{number}'] = np.asarray(draw(photo, found, class_names))
    return drawn


def upright(picture: Image.Image) -> Image.Image:
    """A copy in RGB, turned as the tag of the camera says.

    Raises:
        ValueError: of floating point or 32 bits a pixel.
    """
    return convert(ImageOps.exif_transpose(picture))


def _color(number: int) -> tuple[str, str]:
    """The colour of a class, and that of text on it."""
    color = _COLORS[number % len(_COLORS)]
    return color, 'white' if color in _DARK else 'black'


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=('score_threshold', 'iou_threshold', 'max_detections'),
)
def _detect(
    static: Static, variables: Any, image: jax.Array, shape: jax.Array, **thresholds: Any
) -> dict[str, jax.Array]:
    """What the network finds in one canvas, with boxes in pixels of the photo of `shape`."""
    model = static.module
    outputs = model.apply(variables, image[None].astype('float32') / 255)
    found = yolo.detect(
        outputs,
        image_size=model.image_size,
        anchors=model.anchors,
        masks=model.masks,
        **thresholds,
    )
    found['boxes'] = boxes.from_letterbox(found['boxes'], model.image_size, shape)
    return {key: value[0] for key, value in found.items()}
