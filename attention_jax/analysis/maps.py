"""What attention looks at: the maps that the mechanisms in a module or network computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from attention_jax.modules.maps import map_queries


def attention_maps(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: jax.Array,
    queries: Sequence[int] | None = None,
) -> dict[str, jax.Array]:
    """Runs a module in evaluation mode and returns the attention maps inside it.

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
    with map_queries(queries):
        # A new function each time, as the wanted rows are not an argument that `jit` sees.
        run = jax.jit(lambda v, *x: module.apply(v, *x, mutable=['attention_maps'])[1])
        sown = run(variables, *inputs)
    flat = traverse_util.flatten_dict(sown.get('attention_maps', {}), sep='/')
    if not flat:
        raise ValueError(f'{type(module).__name__} holds no mechanism with an attention map')
    # A mechanism with one map calls it 'map': its own path says it all.
    return {path.removesuffix('/map'): value for path, value in flat.items()}
