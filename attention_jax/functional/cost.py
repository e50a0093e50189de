"""Counting multiply-accumulates while a function is traced.

The lowered program of a convolution depends on the device (merged groups, Toeplitz products), so
counting it would count the lowering. The cores count the logical work instead, where they are
called::

    with cost.tally() as counts:
        jax.eval_shape(f, x)
    counts['macs'], counts['matmul']
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

Kind = Literal['macs', 'matmul']

_counts: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar(
    'counts', default=None
)


@contextlib.contextmanager
def tally() -> Iterator[dict[str, int]]:
    """Collects what the cores traced inside this block count.

    Yields:
        A dict that fills up: `macs` (multiply-accumulates of convolutions and dense layers) and
        `matmul` (those of products between two activations). Functions already compiled and
        cached are not traced again and count nothing: use `jax.eval_shape` on a new function.
    """
    counts = {'macs': 0, 'matmul': 0}
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def add(kind: Kind, number: int) -> None:
    """Adds `number` multiply-accumulates of the kind `macs` or `matmul` to the open tally."""
    counts = _counts.get()
    if counts is not None:
        counts[kind] += int(number)
