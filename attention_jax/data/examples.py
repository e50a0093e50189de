"""What batches are made of: one split of a data set, by position, and what the set holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set holds; a task's own may add fields.

    A run writes it to config.json, and from there its task is created again: JSON's types and
    tuples, which come back as lists.

    Attributes:
        name: as in `data.name`.
        image_shape: (h, w, c) of the images in a batch.
        num_classes: classes are 0 .. num_classes - 1; 0 where there are none.
        class_names: one a class.
        splits: {name: number of examples}, all that are known.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """One split, example by example. A subclass has `__len__` and `example`, the rest if it must.

    Attributes:
        description: of the whole data set.
        split: what was asked for, such as 'train[:90%]'.
        in_memory: the decoded pictures are held, so that `data.workers` are not started.
        in_batches: examples are taken by `batch`, all of a batch at once: for arrays in memory.
        by_position: `train_example` takes (position, index), the position being the number of
            examples before it in the run; else the index alone.
    """

    description: Description
    split: str

    in_memory: ClassVar[bool] = True
    in_batches: ClassVar[bool] = False
    by_position: ClassVar[bool] = False

    def __len__(self) -> int:
        """Number of examples."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What was left out of the data so far and why, counted, a line each."""
        return []

    def example(self, index: int) -> Batch:
        """An example as it is evaluated, without the axis of the batch."""
        raise NotImplementedError

    def train_example(self, index: Any, rng: np.random.Generator) -> Batch:
        """An example to train on, augmented by draws from `rng`."""
        del rng
        return self.example(index)

    def eval_example(self, position: int) -> Batch:
        """An example and its 'mask', 1; a position from the length on is padding: all zeros."""
        if position >= len(self):
            return self._padding
        return {**self.example(position), 'mask': np.float32(1)}

    @functools.cached_property
    def _padding(self) -> Batch:
        return {key: np.zeros_like(value) for key, value in self.eval_example(0).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """Several examples as they are evaluated, in arrays of their own."""
        raise NotImplementedError

    def train_batch(
        self, indices: np.ndarray, rng: np.random.Generator, batch_size: int, share: slice
    ) -> Batch:
        """Several examples to train on, a part of a batch.

        Args:
            indices: of the part's examples, int [batch_size / processes].
            rng: of the whole batch.
            batch_size: of the whole batch.
            share: which of the whole batch the part is: the draws are those of the whole.
        """
        del rng, batch_size, share
        return self.batch(indices)

    def eval_batch(self, positions: np.ndarray) -> Batch:
        """`eval_example` of each position."""
        there = positions < len(self)
        batch = self.batch(np.where(there, positions, 0))
        for values in batch.values():
            values[~there] = 0
        return {**batch, 'mask': there.astype(np.float32)}
