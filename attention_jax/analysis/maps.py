"""What attention looks at: the maps that the mechanisms in a module or network computed."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from attention_jax.modules.maps import MAPS, QUERIES
from attention_jax.modules.static import Static


def attention_maps(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: jax.Array,
    queries: Sequence[int] | None = None,
) -> dict[str, jax.Array]:
    """Runs a module in evaluation mode and returns the attention maps inside it.

    The program is compiled at the first call and kept for others with equal shapes, whatever the
    queries.

    Args:
        module: a mechanism or a network, Linen.
        variables: its variables.
        *inputs: what it is called with, e.g. images `[b, h, w, c]`.
        queries: for maps over pairs of positions, the query positions (row-major indices) wanted;
            only those rows are computed, so that a large map needs no n x m array. None is all.

    Returns:
        Path of the mechanism -> map in its natural shape: a gate of channels `[b, c]`, of positions
        `[b, h, w]`, weights of pairs `[b, n, m]` or `[b, heads, n, m]`. A mechanism with several
        maps has one path for each.

    Raises:
        ValueError: no mechanism inside has a map, or a query outside the map.
    """
    static = Static(module)
    if queries is not None:
        every = _run.eval_shape(static, (MAPS, QUERIES), variables, *inputs).get(QUERIES, {})
        wanted = jax.tree.map(functools.partial(_rows, tuple(int(p) for p in queries)), every)
        variables = {**variables, QUERIES: wanted}
    sown = _run(static, (MAPS,), variables, *inputs)
    flat = traverse_util.flatten_dict(sown.get(MAPS, {}), sep='/')
    if not flat:
        raise ValueError(f'{type(module).__name__} holds no mechanism with an attention map')
    # A mechanism with one map calls it 'map': its own path says it all.
    return {path.removesuffix('/map'): value for path, value in flat.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(static: Static, collections: tuple[str, ...], variables: Any, *inputs: Any) -> Any:
    return static.module.apply(variables, *inputs, mutable=list(collections))[1]


def _rows(queries: tuple[int, ...], every: jax.ShapeDtypeStruct) -> jax.Array:
    """The positions wanted of a mechanism with the positions `every [..., n]`."""
    *lifted, n = every.shape  # `nn.vmap` or `nn.scan` may have given the collection axes
    if not all(0 <= p < n for p in queries):
        raise ValueError(f'queries must be positions from 0 to {n - 1}, got {queries}')
    return jnp.broadcast_to(jnp.asarray(queries, every.dtype), (*lifted, len(queries)))
