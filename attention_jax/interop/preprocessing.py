"""How an image becomes what published weights were trained on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attention_jax import checks
from attention_jax.models.registry import ModelEntry

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP = 0.875


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, normalise.

    Attributes:
        mean: of each channel, of values in 0 to 1.
        std: likewise, to divide by.
        crop: side of the central crop over the shorter side of the resized image, above 0, up to 1.
        interpolation: of the resizing, one of `INTERPOLATIONS`, as Pillow means them.
        input_size: height and width of the crop, in pixels.
    """

    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    crop: float = _CROP
    interpolation: str = 'bilinear'
    input_size: tuple[int, int] = (224, 224)

    def __post_init__(self) -> None:
        """Refuses what cannot be done to an image."""
        checks.choice('interpolation', self.interpolation, INTERPOLATIONS)
        if not 0 < self.crop <= 1:
            raise ValueError(f'crop must be above 0 and at most 1, got {self.crop}')
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f'mean and std must have a number a channel, std above 0: got {self.mean} and '
                f'{self.std}'
            )


# Whole pictures, pixels over 255: what networks that detect take.
PIXELS = Preprocessing((0.0,) * 3, (1.0,) * 3, 1.0, 'bicubic')
_USUAL = {
    'torchvision': Preprocessing(),
    'timm': Preprocessing(interpolation='bicubic'),
    'pixels': PIXELS,
}


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Reads the preprocessing of timm's `config.json`: at the size and crop of its training.

    timm's tables of accuracies may use a larger `test_input_size`, which is not read.
    """
    facts = config.get('pretrained_cfg', config)
    interpolation = facts.get('interpolation', 'bicubic')
    return Preprocessing(
        mean=tuple(facts.get('mean', _IMAGENET_MEAN)),
        std=tuple(facts.get('std', _IMAGENET_STD)),
        crop=facts.get('crop_pct', _CROP),
        # Where training draws the interpolation, timm evaluates with this one.
        interpolation='bilinear' if interpolation == 'random' else interpolation,
        input_size=tuple(facts.get('input_size', (3, 224, 224))[1:]),
    )


def default(entry: ModelEntry) -> Preprocessing:
    """What is usual for a network where its weights do not say."""
    return dataclasses.replace(_USUAL[entry.preprocessing], input_size=tuple(entry.input_size))
