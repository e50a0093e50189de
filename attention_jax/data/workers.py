"""Decoding in other processes (grain's `mp_prefetch`). Imports grain: load it only when needed."""

from __future__ import annotations

from typing import Any

import grain
from absl import flags


class WorkerIterator(grain.DatasetIterator):
    """Iterates over batches that `workers` processes make, in the batches' own order.

    grain's own iterator has a state that names its workers, and so fits no other number of them.
    Batch n depends on n alone, so here the state is {'next_index': n}, as without workers.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        """Starts nothing yet: the processes start with the first batch."""
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._next_index = 0
        self._inner: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        """The next batch; the first call waits for the processes to start."""
        if self._inner is None:
            # grain reads absl flags in the workers' parent; a notebook has parsed none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            rest = self._batches[self._next_index :].to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            )
            self._inner = iter(rest.mp_prefetch(grain.MultiprocessingOptions(self._workers)))
        batch = next(self._inner)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of batches taken."""
        return {'next_index': self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after `state['next_index']` batches."""
        self._stop()
        self._next_index = state['next_index']

    def close(self) -> None:
        """Ends the processes."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None
