"""One split of labelled pictures: the examples and batches made of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from attention_jax import data
from attention_jax.data import settings
from attention_jax.data.examples import Batch
from attention_jax.data.transforms import to_array, to_picture
from attention_jax.tasks.classification import reading, transforms
from attention_jax.tasks.classification.reading import Description

AUGMENTATIONS = ('none', 'pad_crop', 'pad_crop_flip', 'random_resized_crop')
_LARGEST_PAD_CROP = 96  # pixels a side; above it 'auto' takes random resized crops (STL-10 is 96)
_DEFAULT_SIZE = 224  # for data sets whose pictures differ in size


@dataclasses.dataclass(frozen=True, eq=False)
class Source(data.Examples):
    """Examples 'image' uint8 [h, w, c] and 'label' int32 [], of arrays or of encoded records.

    Attributes:
        augment: one of `AUGMENTATIONS`.
        images: uint8 [n, h, w, c] in memory, or None. Of `description.image_shape`, except with
            'random_resized_crop', which crops from the pictures as they are stored.
        labels: int32 [n], beside `images`.
        records: else a sequence of {'image': encoded bytes or array, 'label': int}.
    """

    description: Description
    augment: str
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    records: Any = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.records if self.images is None else self.images)

    @property
    def in_memory(self) -> bool:
        """Whether the decoded pictures are held."""
        return self.images is not None

    @property
    def in_batches(self) -> bool:
        """Whether a whole batch is gathered and augmented at once (else picture by picture)."""
        return self.in_memory and self.augment != 'random_resized_crop'

    def batch(self, indices: np.ndarray) -> Batch:
        """Several pictures out of memory."""
        return {'image': self.images[indices], 'label': self.labels[indices]}

    def train_batch(
        self, indices: np.ndarray, rng: np.random.Generator, batch_size: int, share: slice
    ) -> Batch:
        """Several pictures out of memory, padded, cropped and mirrored as `augment` says."""
        batch = self.batch(indices)
        if self.augment != 'none':
            # Drawn for the whole global batch: this process's part is the same part of one draw.
            offsets, flips = _draw(batch_size, self.augment, rng)
            batch['image'] = transforms.pad_crop(batch['image'], offsets[share], flips[share])
        return batch

    def train_example(self, index: int, rng: np.random.Generator) -> Batch:
        """An augmented example."""
        picture, label = self._stored(index)
        size, interpolation = self.description.image_shape[:2], self.description.interpolation
        if self.augment == 'random_resized_crop':
            image = to_array(transforms.random_resized_crop(picture, size, rng, interpolation))
            if self.description.flip and rng.random() < 0.5:
                image = image[:, ::-1]
        else:
            whole = transforms.resize_and_crop(picture, size, interpolation=interpolation)
            image = to_array(whole)
            if self.augment != 'none':
                offsets, flips = _draw(1, self.augment, rng)
                image = transforms.pad_crop(image[None], offsets, flips)[0]
        return {'image': image, 'label': label}

    def example(self, index: int) -> Batch:
        """The middle of a picture: all of it, or what random crops are compared with."""
        picture, label = self._stored(index)
        description = self.description
        ratio = 1 / description.crop if self.augment == 'random_resized_crop' else 1.0
        image = transforms.resize_and_crop(
            picture, description.image_shape[:2], ratio, description.interpolation
        )
        return {'image': to_array(image), 'label': label}

    def _stored(self, index: int) -> tuple[Image.Image, np.int32]:
        """A picture in its stored size, and its label."""
        if self.images is None:
            record = self.records[index]
            image, label = record['image'], record['label']
        else:
            image, label = self.images[index], self.labels[index]
        return to_picture(image, self.description.image_shape[-1]), np.int32(label)


def open_split(
    config: Any, split: str, preprocessing: Any = None, *, train: bool = False
) -> Source:
    """Opens one split of a data set; see `tasks.open_source`.

    Nothing is downloaded: a TFDS name must be prepared in `data.data_dir`, as array_record.

    Args:
        config: the whole config. `data.name` is 'digits' (scikit-learn's 1,797 handwritten digits,
            enlarged to 32x32x1; every fifth is the test split; no files), or any TFDS name with
            `image` and `label`, such as 'cifar10', 'imagenet2012', 'emnist/letters'.
            `data.augment` 'auto' takes random resized crops of large pictures, else pads and
            crops, with flips where the data set allows them; `data.cache` None holds pictures of
            one size that take less than 1 GiB.
        split: a TFDS split string: 'train', 'train[:90%]', 'train[90%:]+test'.
        preprocessing: its `mean` and `std`, if they are of as many channels, `crop` and
            `interpolation` take the place of the description's, its `input_size` that of 224.
        train: not used: the loader augments what is trained on.

    Raises:
        ValueError: an unknown name, split, size, augmentation or cache setting; data that is not
            there (with the way to prepare it), or that is not pictures with class labels.
    """
    del train
    description, records = reading.open_data(config.data, split)
    *sides, channels = description.image_shape
    native = None if None in sides else tuple(sides)
    usual = native or getattr(preprocessing, 'input_size', (_DEFAULT_SIZE,) * 2)
    size = settings.image_size(config.data, usual, "the data set's own size")
    changes: dict[str, Any] = {'image_shape': (*size, channels)}
    if preprocessing is not None:
        changes |= {'crop': preprocessing.crop, 'interpolation': preprocessing.interpolation}
        if len(preprocessing.mean) == channels:
            changes |= {'mean': preprocessing.mean, 'std': preprocessing.std}
    description = dataclasses.replace(description, **changes)
    augment = _augmentation(config.data, description, native)

    stored = native if augment == 'random_resized_crop' else size
    cache = settings.cache(config.data)
    if cache and stored is None:
        raise ValueError(
            f'data.cache True needs pictures of one size, and those of {description.name!r} '
            'differ; use False, or an augmentation that does not crop from the stored picture: '
            f'{", ".join(AUGMENTATIONS[:3])}'
        )
    if cache is None:
        size_in_memory = math.prod((len(records), *(stored or ()), channels))
        cache = native is not None and size_in_memory < settings.CACHE_LIMIT
    if not cache and not isinstance(records, list):
        return Source(description, split, augment, records=records)
    shape = (*stored, channels)
    images, labels = reading.decode_all(records, shape, description.interpolation)
    return Source(description, split, augment, images=images, labels=labels)


def _augmentation(
    data_config: Any, description: Description, native: tuple[int, int] | None
) -> str:
    auto = 'pad_crop_flip' if description.flip else 'pad_crop'
    if native is None or max(native) > _LARGEST_PAD_CROP:
        auto = 'random_resized_crop'
    augment = settings.augmentation(data_config, AUGMENTATIONS, auto)
    if augment == 'pad_crop_flip' and not description.flip:
        raise ValueError(
            f"data.augment 'pad_crop_flip' mirrors pictures, and a mirrored picture of "
            f"{description.name!r} is not of its class; use 'pad_crop'"
        )
    return augment


def _draw(count: int, augment: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [count, 2] and flips [count] for `transforms.pad_crop`."""
    offsets = rng.integers(2 * transforms.PADDING + 1, size=(count, 2))
    if augment == 'pad_crop_flip':
        return offsets, rng.random(count) < 0.5
    return offsets, np.zeros(count, bool)
