"""Attention maps: which are stored, and which rows of them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

_queries: contextvars.ContextVar[tuple[int, ...] | None] = contextvars.ContextVar(
    'queries', default=None
)


@contextlib.contextmanager
def map_queries(positions: Sequence[int] | None) -> Iterator[None]:
    """Within it, maps over pairs of positions hold only the rows of these query positions."""
    token = _queries.set(None if positions is None else tuple(int(p) for p in positions))
    try:
        yield
    finally:
        _queries.reset(token)


def wanted_queries(query: jax.Array) -> jax.Array:
    """The rows of query `[..., n, d]` that a map was asked for: all, or those of `map_queries`."""
    positions = _queries.get()
    if positions is None:
        return query
    n = query.shape[-2]
    if not all(0 <= p < n for p in positions):
        raise ValueError(f'queries must be positions from 0 to {n - 1}, got {positions}')
    return jnp.take(query, jnp.asarray(positions), axis=-2)


def sow_map(module: nn.Module, compute: Callable[[], jax.Array], name: str = 'map') -> None:
    """Stores an attention map in the collection `attention_maps` if it was asked for.

    Training pays nothing: `compute` is called only when the collection is mutable, and never while
    the module is being initialised (when every collection is mutable).
    """
    if module.is_mutable_collection('attention_maps') and not module.is_initializing():
        module.sow(
            'attention_maps', name, compute(), init_fn=lambda: None, reduce_fn=lambda _, new: new
        )
