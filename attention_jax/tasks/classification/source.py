"""One split of labelled pictures: what it holds, and the examples and batches made of it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from attention_jax.data import transforms

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set holds.

    Attributes:
        name: as in `data.name`.
        image_shape: (h, w, c) of the pictures in a batch.
        num_classes: labels are 0 .. num_classes - 1.
        class_names: one a label.
        splits: {name: number of examples}, all that there are.
        mean: over the channels, of values in 0..1, to normalise with.
        std: the same.
        flip: whether a mirrored picture is still of its class.
        crop: what evaluation keeps of a large picture: side of the centre crop over the shorter
            side before it.
        interpolation: Pillow's name of the filter that resizes, in small letters.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    splits: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop: float = transforms.EVAL_CROP
    interpolation: str = 'bilinear'


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split, by position: arrays in memory, or records that are decoded when asked for.

    Attributes:
        description: of the whole data set.
        split: what was asked for, such as 'train[:90%]'.
        augment: one of `AUGMENTATIONS`.
        images: uint8 [n, h, w, c] in memory, or None. Of `description.image_shape`, except with
            'random_resized_crop', which crops from the pictures as they are stored.
        labels: int32 [n], beside `images`.
        records: else a sequence of {'image': encoded bytes or array, 'label': int}.
    """

    description: Description
    split: str
    augment: str
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    records: Any = None
    by_position: ClassVar[bool] = False

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.records if self.images is None else self.images)

    @property
    def in_batches(self) -> bool:
        """Whether a whole batch is gathered and augmented at once (else picture by picture)."""
        return self.in_memory and self.augment != 'random_resized_crop'

    @property
    def in_memory(self) -> bool:
        """Whether the decoded pictures are held."""
        return self.images is not None

    def example(self, index: int) -> tuple[Image.Image, int]:
        """One picture in its stored size, and its label."""
        channels = self.description.image_shape[-1]
        if self.images is not None:
            return transforms.to_picture(self.images[index], channels), int(self.labels[index])
        record = self.records[index]
        return transforms.to_picture(record['image'], channels), int(record['label'])

    def warnings(self) -> list[str]:
        """Nothing is left out."""
        return []

    def train_batch(
        self, indices: np.ndarray, rng: np.random.Generator, batch_size: int, share: slice
    ) -> Batch:
        """A part of an augmented batch.

        Args:
            indices: of the part's examples, int [batch_size / processes].
            rng: of the whole batch.
            batch_size: of the whole batch.
            share: which of the whole batch the part is.

        Returns:
            'image' uint8 [n, h, w, c], 'label' int32 [n].
        """
        images = self.images[indices]
        if self.augment != 'none':
            # Drawn for the whole global batch: this process's part is the same part of one draw.
            offsets, flips = _draw(batch_size, self.augment, rng)
            images = transforms.pad_crop(images, offsets[share], flips[share])
        return {'image': images, 'label': self.labels[indices]}

    def train_example(self, index: int, rng: np.random.Generator) -> Batch:
        """An augmented example: 'image' uint8 [h, w, c], 'label' int32 []."""
        picture, label = self.example(index)
        description = self.description
        size, interpolation = description.image_shape[:2], description.interpolation
        if self.augment == 'random_resized_crop':
            crop = transforms.random_resized_crop(picture, size, rng, interpolation)
            image = transforms.to_array(crop)
            if description.flip and rng.random() < 0.5:
                image = image[:, ::-1]
        else:
            whole = transforms.resize_and_crop(picture, size, interpolation=interpolation)
            image = transforms.to_array(whole)
            if self.augment != 'none':
                offsets, flips = _draw(1, self.augment, rng)
                image = transforms.pad_crop(image[None], offsets, flips)[0]
        return {'image': image, 'label': np.int32(label)}

    def eval_batch(self, positions: np.ndarray) -> Batch:
        """A batch of evaluation; a position from the length on is padding, its 'mask' 0."""
        there = positions < len(self)
        indices = np.where(there, positions, 0)
        images = self.images[indices]
        images[~there] = 0
        return {
            'image': images,
            'label': np.where(there, self.labels[indices], 0).astype(np.int32),
            'mask': there.astype(np.float32),
        }

    def eval_example(self, position: int) -> Batch:
        """One example of evaluation; a position from the length on is padding, its 'mask' 0."""
        description = self.description
        shape = description.image_shape
        if position >= len(self):
            image, label = np.zeros(shape, np.uint8), 0
        else:
            picture, label = self.example(position)
            ratio = 1 / description.crop if self.augment == 'random_resized_crop' else 1.0
            image = transforms.to_array(
                transforms.resize_and_crop(picture, shape[:2], ratio, description.interpolation)
            )
        return {
            'image': image,
            'label': np.int32(label),
            'mask': np.float32(position < len(self)),
        }


def _draw(count: int, augment: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [count, 2] and flips [count] for `transforms.pad_crop`."""
    offsets = rng.integers(2 * transforms.PADDING + 1, size=(count, 2))
    if augment == 'pad_crop_flip':
        return offsets, rng.random(count) < 0.5
    return offsets, np.zeros(count, bool)
