"""Where labelled pictures come from: the embedded `digits`, and any TFDS name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from attention_jax import data
from attention_jax.data import prepared, settings, transforms
from attention_jax.tasks.classification.transforms import EVAL_CROP, resize_and_crop

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation of train / 255, over pictures and positions; for ImageNet the
# rounded numbers that published weights were trained with.
_STATISTICS = {
    'cifar10': ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    'cifar100': ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    'imagenet2012': _IMAGENET,
}
# A mirrored character is another character or none.
_NO_FLIP = ('digits', 'mnist', 'svhn', 'omniglot', 'cmaterdb', 'gtsrb')


@dataclasses.dataclass(frozen=True)
class Description(data.Description):
    """What a data set holds.

    Attributes:
        mean: over the channels, of values in 0..1, to normalise with; or one number for all.
        std: the same.
        flip: whether a mirrored picture is still of its class.
        crop: what evaluation keeps of a large picture: side of the centre crop over the shorter
            side before it.
        interpolation: Pillow's name of the filter that resizes, in small letters.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    flip: bool = True
    crop: float = EVAL_CROP
    interpolation: str = 'bilinear'


def open_data(data_config: Any, split: str) -> tuple[Description, Any]:
    """Opens a split of `data_config.name`; see `source.open_split`.

    Returns:
        the description, with None for the sides of pictures that differ in size; and the records
        {'image': encoded bytes or array, 'label': int} by position: a list if they are in memory.
    """
    name = getattr(data_config, 'name', None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"data.name {name!r} must be 'digits' or the name of a TFDS data set")
    if name == 'digits':
        return _digits(split)
    return _tfds(name, getattr(data_config, 'data_dir', None), split)


def _digits(split: str) -> tuple[Description, list[dict[str, Any]]]:
    """scikit-learn's `load_digits` (UCI optical recognition of handwritten digits), from memory."""
    from sklearn.datasets import load_digits  # over a second to import

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    images = np.stack(
        [
            transforms.to_array(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR))
            for x in small
        ]
    )
    test = np.arange(len(images)) % 5 == 4
    parts = {'train': np.flatnonzero(~test), 'test': np.flatnonzero(test)}
    splits = {key: len(part) for key, part in parts.items()}
    ranges = settings.split_ranges('digits', split, splits)
    chosen = np.concatenate([parts[key][low:high] for key, low, high in ranges])
    train = images[parts['train']] / 255
    description = Description(
        name='digits',
        image_shape=images.shape[1:],
        num_classes=10,
        class_names=tuple('0123456789'),
        splits=splits,
        mean=(float(train.mean()),),
        std=(float(train.std()),),
        flip=False,
    )
    return description, [{'image': images[i], 'label': digits.target[i]} for i in chosen]


def _tfds(name: str, data_dir: str | None, split: str) -> tuple[Description, Any]:
    """A prepared TFDS data set through its random-access reader, which needs no TensorFlow."""
    builder = prepared.open_builder(name, data_dir, 'digits')
    image, label = _image_and_label(name, builder.info.features)
    splits = {key: info.num_examples for key, info in builder.info.splits.items()}
    settings.split_ranges(name, split, splits)
    base = prepared.base_name(name)
    default = _IMAGENET if image.shape[-1] == 3 else ((0.5,) * image.shape[-1],) * 2
    mean, std = _STATISTICS.get(base, default)
    description = Description(
        name=name,
        image_shape=tuple(image.shape),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        splits=splits,
        mean=mean,
        std=std,
        flip=base == 'fashion_mnist' or not any(word in base for word in _NO_FLIP),
    )
    return description, prepared.records(builder, split)


def _image_and_label(name: str, features: Any) -> tuple[Any, Any]:
    """The features `image` and `label`, checked."""
    keys = prepared.feature_names(features)
    if not {'image', 'label'} <= set(keys):
        raise ValueError(
            f'data.name {name!r} has the features {", ".join(keys)}; classification needs '
            "'image' and 'label'"
        )
    image, label = features['image'], features['label']
    prepared.check_label(name, 'its label', label, 'classification')
    shape = tuple(image.shape)
    channels = transforms.CHANNELS
    if len(shape) != 3 or shape[-1] not in channels or image.np_dtype != np.uint8:
        raise ValueError(
            f'data.name {name!r}: its images are {np.dtype(image.np_dtype)} {shape}, and uint8 '
            f'(h, w, c) with c one of {channels} is needed'
        )
    return image, label


def decode_all(
    records: Any, shape: tuple[int, int, int], interpolation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split into uint8 [n, h, w, c] and int32 [n].

    In one thread, because for small pictures the threads only wait for each other (PNGs of 32x32:
    0.10 ms each with one thread, 0.12 ms with two or four).
    """
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    in_order = records if isinstance(records, list) else prepared.read_all(records)
    for i, record in enumerate(in_order):
        picture = transforms.to_picture(record['image'], shape[-1])
        images[i] = transforms.to_array(
            resize_and_crop(picture, shape[:2], interpolation=interpolation)
        )
        labels[i] = record['label']
    return images, labels
