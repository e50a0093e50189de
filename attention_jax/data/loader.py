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

from attention_jax.data.examples import Batch, Examples

if TYPE_CHECKING:
    import grain

_MOST_THREADS = 16  # each holds a batch of decoded pictures, 38 MB for 256 of 224x224


def train_batches(
    source: Examples,
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
        An iterator of what the source makes, with an axis of batch_size / process_count in front.
        `get_state()` is {'next_index': n}, n the number of batches taken; `set_state` continues
        there. Close it (`close()`) when done.

    Raises:
        ValueError: arguments that make no batches.
    """
    import grain  # a second to import

    local = _share_of(batch_size, process_index, process_count)
    if batch_size > len(source):
        raise ValueError(
            f'train.batch_size {batch_size} is larger than the split {source.split!r} of '
            f'{source.description.name!r}, which has {len(source)} examples: lower it'
        )
    share = slice(process_index, None, process_count)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    if source.in_batches:
        indices = order[share].batch(local, drop_remainder=True, batch_fn=np.asarray)
        make = functools.partial(source.train_batch, batch_size=batch_size, share=share)
        batches = indices.random_map(make)
    else:
        if source.by_position:
            order = order.map_with_index(_with_position)
        # Before the share is taken, so that the draws belong to the example's global position.
        examples = order.random_map(source.train_example)
        batches = examples[share].batch(local, drop_remainder=True)
    return _iterate(batches, source, getattr(data_config, 'workers', None))


def number_of_steps(train_config: Any, examples: int) -> int:
    """Batches of a whole run: `train.steps`, else as many as make `train.epochs` of `examples`."""
    wanted = train_config.epochs * examples / train_config.batch_size
    return train_config.steps or max(1, round(wanted))


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """The batches of one evaluation; each `iter()` starts from the first.

    Attributes:
        batches: the grain data set of this process's batches.
        source: what they come from.
        workers: as `data.workers`.
    """

    batches: grain.MapDataset[Batch]
    source: Examples
    workers: int | None

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
    source: Examples,
    data_config: Any,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Every example once, in order, in batches of one size.

    Arguments and errors are those of `train_batches`.

    Returns:
        An iterable, of known length, of what the source makes and a 'mask' float32 [b], b =
        batch_size / process_count. The last batch is filled up with black pictures of mask 0.
    """
    import grain

    local = _share_of(batch_size, process_index, process_count)
    total = -(-len(source) // batch_size) * batch_size
    positions = grain.MapDataset.range(total)[process_index::process_count]
    if source.in_batches:
        batches = positions.batch(local, batch_fn=np.asarray).map(source.eval_batch)
    else:
        batches = positions.map(source.eval_example).batch(local)
    return EvalBatches(batches, source, getattr(data_config, 'workers', None))


def _with_position(position: int, index: int) -> tuple[int, int]:
    return position, index


def _iterate(
    batches: grain.MapDataset[Batch], source: Examples, workers: int | None
) -> grain.DatasetIterator[Batch]:
    """Prepares batches ahead, in the way that suits where the pictures are."""
    import grain

    if workers and not source.in_memory:
        from attention_jax.data.workers import WorkerIterator

        return WorkerIterator(batches, workers)
    # NumPy on whole batches: one thread beside the training step; more would fight over Python's
    # lock. Decoding lets go of the lock, so there each core gets a batch to work on.
    threads = 1 if source.in_batches else min(os.cpu_count() or 1, _MOST_THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    return iter(batches.to_iter_dataset(options))


def _share_of(batch_size: int, process_index: int, process_count: int) -> int:
    """The number of examples of a batch that one process makes."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'process_index {process_index} must be from 0 to process_count - 1 = '
            f'{process_count - 1}'
        )
    if batch_size % process_count:
        raise ValueError(
            f'train.batch_size {batch_size} must be divisible by the {process_count} processes'
        )
    return batch_size // process_count
