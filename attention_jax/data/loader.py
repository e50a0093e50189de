"""From a source to batches of NumPy arrays for this process.

Batch n is a pure function of (seed, n). The examples of a global batch are dealt out to the
processes one by one, after the shuffle, and so are their augmentations: what all processes see
together does not depend on how many they are.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from attention_jax.data import transforms
from attention_jax.data.sources import Source

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
_MOST_THREADS = 16  # each holds a batch of decoded pictures, 38 MB for 256 of 224x224


def train_batches(
    source: Source,
    data_config: Any,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled and augmented batches, each epoch in a new order.

    Batches follow one another without regard to epochs, so none is short and every example comes
    once in each `len(source)` examples. They are prepared in the background.

    Args:
        source: what to read.
        data_config: `workers`, the number of processes that decode pictures which are not held
            in memory (None or 0: threads of this one); it changes no batch.
        batch_size: of all processes together.
        seed: 0 .. 2**32 - 1, of the order and the augmentation.
        process_index: of this process.
        process_count: how many share the batch.

    Returns:
        An iterator of {'image': uint8 [batch_size / process_count, h, w, c], 'label': int32
        [batch_size / process_count]}. `get_state()` is {'next_index': n}, n the number of batches
        taken; `set_state` continues there. Close it (`close()`) when done.

    Raises:
        ValueError: arguments that make no batches.
    """
    import grain  # a second to import

    _check_batch(batch_size, process_index, process_count)
    if batch_size > len(source):
        raise ValueError(
            f'train.batch_size {batch_size} is larger than the split {source.split!r} of '
            f'{source.description.name!r}, which has {len(source)} examples'
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f'train.seed {seed!r} must be a whole number from 0 to 2**32 - 1')
    share = slice(process_index, None, process_count)
    local = batch_size // process_count
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    if source.in_batches:
        batches = order[share].batch(local, drop_remainder=True, batch_fn=np.asarray)
        make = functools.partial(_augmented_batch, source, batch_size, share)
        batches = batches.random_map(make)
    else:
        # Before the share is taken, so that the draws belong to the example's global position.
        examples = order.random_map(functools.partial(_augmented_example, source))
        batches = examples[share].batch(local, drop_remainder=True)
    return _iterate(batches, source, _workers(data_config))


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The batches of one evaluation; each `iter()` starts from the first.

    Attributes:
        batches: the grain data set of this process's batches.
        source: what they come from.
        workers: as `data.workers`.
    """

    batches: grain.MapDataset[Batch]
    source: Source
    workers: int

    def __len__(self) -> int:
        """Number of batches, the same on every process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; those to come are prepared in the background."""
        iterator = _iterate(self.batches, self.source, self.workers)
        try:
            yield from iterator
        finally:
            iterator.close()


def eval_batches(
    source: Source,
    data_config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Every example once, in order, in batches of one size.

    Args:
        source: what to read.
        data_config: `workers`, as for `train_batches`.
        batch_size: of all processes together.
        process_index: of this process.
        process_count: how many share the batch.

    Returns:
        An iterable, of known length, of {'image': uint8 [b, h, w, c], 'label': int32 [b], 'mask':
        float32 [b]}, b = batch_size / process_count. The last batch is filled up with black
        pictures of label 0 and mask 0; every other mask is 1.

    Raises:
        ValueError: arguments that make no batches.
    """
    import grain

    _check_batch(batch_size, process_index, process_count)
    total = -(-len(source) // batch_size) * batch_size
    local = batch_size // process_count
    positions = grain.MapDataset.range(total)[process_index::process_count]
    if source.in_batches:
        batches = positions.batch(local, batch_fn=np.asarray)
        batches = batches.map(functools.partial(_plain_batch, source))
    else:
        batches = positions.map(functools.partial(_plain_example, source)).batch(local)
    return EvalBatches(batches, source, _workers(data_config))


def _augmented_batch(
    source: Source, batch_size: int, share: slice, indices: np.ndarray, rng: np.random.Generator
) -> Batch:
    images = source.images[indices]
    if source.augment != 'none':
        # Drawn for the whole global batch: this process's part is the same part of one draw.
        offsets, flips = _draw(batch_size, source.augment, rng)
        images = transforms.pad_crop(images, offsets[share], flips[share])
    return {'image': images, 'label': source.labels[indices]}


def _augmented_example(source: Source, index: int, rng: np.random.Generator) -> Batch:
    picture, label = source.example(index)
    description = source.description
    size, interpolation = description.image_shape[:2], description.interpolation
    if source.augment == 'random_resized_crop':
        crop = transforms.random_resized_crop(picture, size, rng, interpolation)
        image = transforms.to_array(crop)
        if description.flip and rng.random() < 0.5:
            image = image[:, ::-1]
    else:
        whole = transforms.resize_and_crop(picture, size, interpolation=interpolation)
        image = transforms.to_array(whole)
        if source.augment != 'none':
            offsets, flips = _draw(1, source.augment, rng)
            image = transforms.pad_crop(image[None], offsets, flips)[0]
    return {'image': image, 'label': np.int32(label)}


def _draw(count: int, augment: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [count, 2] and flips [count] for `transforms.pad_crop`."""
    offsets = rng.integers(2 * transforms.PADDING + 1, size=(count, 2))
    if augment == 'pad_crop_flip':
        return offsets, rng.random(count) < 0.5
    return offsets, np.zeros(count, bool)


def _plain_batch(source: Source, positions: np.ndarray) -> Batch:
    there = positions < len(source)
    indices = np.where(there, positions, 0)
    images = source.images[indices]
    images[~there] = 0
    return {
        'image': images,
        'label': np.where(there, source.labels[indices], 0).astype(np.int32),
        'mask': there.astype(np.float32),
    }


def _plain_example(source: Source, position: int) -> Batch:
    description = source.description
    shape = description.image_shape
    if position >= len(source):
        image, label = np.zeros(shape, np.uint8), 0
    else:
        picture, label = source.example(position)
        ratio = 1 / description.crop if source.augment == 'random_resized_crop' else 1.0
        image = transforms.to_array(
            transforms.resize_and_crop(picture, shape[:2], ratio, description.interpolation)
        )
    return {
        'image': image,
        'label': np.int32(label),
        'mask': np.float32(position < len(source)),
    }


def _iterate(
    batches: grain.MapDataset[Batch], source: Source, workers: int
) -> grain.DatasetIterator[Batch]:
    """Prepares batches ahead, in the way that suits where the pictures are."""
    import grain

    if source.images is None and workers:
        from attention_jax.data.workers import WorkerIterator

        return WorkerIterator(batches, workers)
    # NumPy on whole batches: one thread beside the training step; more would fight over Python's
    # lock. Decoding lets go of the lock, so there each core gets a batch to work on.
    threads = 1 if source.in_batches else min(os.cpu_count() or 1, _MOST_THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    return iter(batches.to_iter_dataset(options))


def _workers(data_config: Any) -> int:
    workers = getattr(data_config, 'workers', None) or 0
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(
            f'data.workers {workers!r} must be a number of processes, 0 or None for none'
        )
    return workers


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f'train.batch_size {batch_size!r} must be a positive whole number')
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'process_index {process_index} must be from 0 to process_count - 1 = '
            f'{process_count - 1}'
        )
    if batch_size % process_count:
        raise ValueError(
            f'train.batch_size {batch_size} must be divisible by the {process_count} processes'
        )
