"""Pictures of files as Pillow's and as arrays: uint8 throughout."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's names for the channel counts
CHANNELS = tuple(_MODES)


def to_picture(data: bytes | np.ndarray, channels: int) -> Image.Image:
    """Decodes a PNG or JPEG, or wraps an array, as a Pillow picture of `channels` channels.

    Args:
        data: an encoded picture, or uint8 [h, w, c].
        channels: 1, 3 or 4. A grey file becomes RGB if 3 are asked for, and so on.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if channels == 1 else data)
    return convert(Image.open(io.BytesIO(data)), _MODES[channels])


def convert(picture: Image.Image, mode: str = 'RGB') -> Image.Image:
    """Converts a picture of any file to 8 bits a channel; of 16 bits the upper eight are kept.

    Raises:
        ValueError: floating point or 32 bits a pixel, whose black and white are not known.
    """
    if picture.mode in ('I', 'F'):
        raise ValueError(f'a picture of mode {picture.mode!r} has no known range of brightness')
    if picture.mode.startswith('I;16'):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert(mode)


def to_array(picture: Image.Image) -> np.ndarray:
    """A Pillow picture as uint8 [h, w, c]; a grey one has c = 1."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array
