"""Where pictures come from: the embedded `digits`, and any TFDS name, without TensorFlow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from attention_jax.data import prepared, settings, transforms
from attention_jax.tasks.classification.source import Description, Source

AUGMENTATIONS = ('none', 'pad_crop', 'pad_crop_flip', 'random_resized_crop')
_BLOCK = 512  # records read at a time while a split is decoded into memory
_LARGEST_PAD_CROP = 96  # pixels a side; above it 'auto' takes random resized crops (STL-10 is 96)
_DEFAULT_SIZE = 224  # for data sets whose pictures differ in size

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


def open_split(
    config: Any, split: str, preprocessing: Any = None, *, train: bool = False
) -> Source:
    """Opens one split of a data set.

    Nothing is downloaded: a TFDS name must be prepared in `data_dir`, as array_record.

    Args:
        config: the whole config. Of `config.data`, a missing one is None:
            `name`: 'digits' (scikit-learn's 1,797 handwritten digits, enlarged to 32x32x1; every
            fifth is the test split; no files), or any TFDS name with `image` and `label`, such as
            'cifar10', 'imagenet2012', 'emnist/letters'.
            `data_dir`: where TFDS finds it; None is TFDS's own default.
            `image_size`: side in pixels of the square pictures in a batch; None is the data
            set's own size, or 224 if its pictures differ.
            `augment`: one of `AUGMENTATIONS`; None or 'auto' chooses: random resized crops for
            large pictures, else pad and crop, with flips where the data set allows it.
            `cache`: True holds the decoded pictures in memory, False does not; None or 'auto' does
            if they all have one size and take less than 1 GiB.
        split: a TFDS split string: 'train', 'train[:90%]', 'train[90%:]+test'.
        preprocessing: an object with the attributes below, to take in place of the data set's own;
            None changes nothing.
            `mean`, `std`: as in `Description`; for as many channels as the pictures have, else the
            data set's own are kept.
            `crop`, `interpolation`: as in `Description`.
            `input_size`: (h, w) where neither `image_size` nor the data set says one.
        train: not used: the loader augments what is trained on.

    Returns:
        The source, with its description.

    Raises:
        ValueError: an unknown name, split, size, augmentation or cache setting; data that is not
            there (with the way to prepare it), or that is not pictures with class labels.
    """
    del train
    data_config = config.data
    name = getattr(data_config, 'name', None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"data.name {name!r} must be 'digits' or the name of a TFDS data set")
    if name == 'digits':
        return _digits(data_config, split, preprocessing)
    return _tfds(data_config, name, split, preprocessing)


def _digits(data_config: Any, split: str, preprocessing: Any) -> Source:
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
    labels = digits.target.astype(np.int32)
    test = np.arange(len(images)) % 5 == 4
    parts = {'train': np.flatnonzero(~test), 'test': np.flatnonzero(test)}
    ranges = settings.split_ranges(
        'digits', split, {key: len(value) for key, value in parts.items()}
    )
    chosen = np.concatenate([parts[key][low:high] for key, low, high in ranges])
    train = images[parts['train']] / 255
    description = Description(
        name='digits',
        image_shape=(*(_image_size(data_config) or (32, 32)), 1),
        num_classes=10,
        class_names=tuple('0123456789'),
        splits={key: len(value) for key, value in parts.items()},
        mean=(float(train.mean()),),
        std=(float(train.std()),),
        flip=False,
    )
    description = _prepared_as(description, preprocessing)
    augment = _augmentation(data_config, description, native=(32, 32))
    settings.cache_setting(data_config)  # always in memory; only a wrong value matters
    return Source(
        description,
        split,
        augment,
        images=_stored(images[chosen], description, augment),
        labels=labels[chosen],
    )


def _tfds(data_config: Any, name: str, split: str, preprocessing: Any) -> Source:
    """A prepared TFDS data set through its random-access reader, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    builder = prepared.open_builder(name, getattr(data_config, 'data_dir', None), 'digits')
    image, label = prepared.image_and_label(name, builder.info.features)
    splits = {key: info.num_examples for key, info in builder.info.splits.items()}
    ranges = settings.split_ranges(name, split, splits)
    base = prepared.base_name(name)
    channels = image.shape[-1]
    default = _IMAGENET if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    mean, std = _STATISTICS.get(base, default)
    native = None if None in image.shape else (image.shape[0], image.shape[1])
    usual = getattr(preprocessing, 'input_size', (_DEFAULT_SIZE,) * 2)
    description = Description(
        name=name,
        image_shape=(*(_image_size(data_config) or native or usual), channels),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        splits=splits,
        mean=mean,
        std=std,
        flip=base == 'fashion_mnist' or not any(word in base for word in _NO_FLIP),
    )
    description = _prepared_as(description, preprocessing)
    augment = _augmentation(data_config, description, native)
    # Encoded bytes: Pillow decodes them the same way whether OpenCV is installed or not.
    encoded = isinstance(image, tfds.features.Image)
    decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
    with prepared.quiet():
        records = builder.as_data_source(split=split, decoders=decoders)

    crops = augment == 'random_resized_crop'
    stored = native if crops else description.image_shape[:2]
    cache = settings.cache_setting(data_config)
    if cache and stored is None:
        raise ValueError(
            f'data.cache True needs pictures of one size, and those of {name!r} differ; '
            'use False, or an augmentation that does not crop from the stored picture: '
            f'{", ".join(AUGMENTATIONS[:3])}'
        )
    count = sum(high - low for _, low, high in ranges)
    if cache is None:
        cache = native is not None and count * math.prod(stored) * channels < settings.CACHE_LIMIT
    if not cache:
        return Source(description, split, augment, records=records)
    images, labels = _decode_all(records, (*stored, channels), description.interpolation)
    return Source(description, split, augment, images=images, labels=labels)


def _prepared_as(description: Description, preprocessing: Any) -> Description:
    """The description with what `preprocessing` says, where it fits the pictures."""
    if preprocessing is None:
        return description
    changes = {'crop': preprocessing.crop, 'interpolation': preprocessing.interpolation}
    if len(preprocessing.mean) == description.image_shape[-1]:
        changes |= {'mean': preprocessing.mean, 'std': preprocessing.std}
    return dataclasses.replace(description, **changes)


def _image_size(data_config: Any) -> tuple[int, int] | None:
    size = getattr(data_config, 'image_size', None)
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f'data.image_size {size!r} must be a positive whole number of pixels, or None for the '
            "data set's own size"
        )
    return size, size


def _augmentation(
    data_config: Any, description: Description, native: tuple[int, int] | None
) -> str:
    augment = getattr(data_config, 'augment', None)
    if augment is None or augment == 'auto':
        if native is None or max(native) > _LARGEST_PAD_CROP:
            return 'random_resized_crop'
        return 'pad_crop_flip' if description.flip else 'pad_crop'
    if augment not in AUGMENTATIONS:
        raise ValueError(
            f'data.augment {augment!r} must be one of {", ".join(AUGMENTATIONS)}, or auto'
        )
    if augment == 'pad_crop_flip' and not description.flip:
        raise ValueError(
            f"data.augment 'pad_crop_flip' mirrors pictures, and a mirrored picture of "
            f"{description.name!r} is not of its class; use 'pad_crop'"
        )
    return augment


def _stored(images: np.ndarray, description: Description, augment: str) -> np.ndarray:
    """The pictures at the size in which a source with `augment` holds them."""
    h, w, c = description.image_shape
    if augment == 'random_resized_crop' or images.shape[1:3] == (h, w):
        return images.reshape(*images.shape[:3], c)
    resized = np.empty((len(images), h, w, c), np.uint8)
    for i, image in enumerate(images.reshape(*images.shape[:3], c)):
        picture = transforms.to_picture(image, c)
        resized[i] = transforms.to_array(
            transforms.resize_and_crop(picture, (h, w), interpolation=description.interpolation)
        )
    return resized


def _decode_all(
    records: Any, shape: tuple[int, int, int], interpolation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split into uint8 [n, h, w, c] and int32 [n].

    In blocks, because reading records one by one costs more than decoding them; in one thread,
    because for small pictures the threads only wait for each other (PNGs of 32x32: 0.10 ms each
    with one thread, 0.12 ms with two or four).
    """
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _BLOCK):
        stop = min(start + _BLOCK, len(records))
        for i, record in enumerate(records.__getitems__(list(range(start, stop))), start):
            picture = transforms.to_picture(record['image'], shape[-1])
            images[i] = transforms.to_array(
                transforms.resize_and_crop(picture, shape[:2], interpolation=interpolation)
            )
            labels[i] = record['label']
    return images, labels
