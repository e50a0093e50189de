"""Attention maps: which are stored, and which rows of them.

A mechanism between positions has a map of n queries, often too large to hold. Which of its rows are
wanted is an input of the program like any other: the collection `attention_queries` may hold int32
`positions` at the path of the mechanism. `attention_jax.attention_maps` fills it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax.functional import cost

MAPS = 'attention_maps'
QUERIES = 'attention_queries'


def wanted_queries(module: nn.Module, query: jax.Array) -> jax.Array:
    """The rows of query `[..., n, d]` that a map of this module is asked for, all by default.

    Where the collection `attention_queries` is mutable, the module leaves all its positions there
    `[n]`: so one learns which paths take queries, and how many there are.
    """
    if module.is_mutable_collection(QUERIES):
        module.put_variable(QUERIES, 'positions', jnp.arange(query.shape[-2]))
        return query
    positions = module.get_variable(QUERIES, 'positions')
    return query if positions is None else jnp.take(query, positions, axis=-2)


def sow_map(module: nn.Module, compute: Callable[[], jax.Array], name: str = 'map') -> None:
    """Stores an attention map in the collection `attention_maps` if it was asked for.

    Training pays nothing: `compute` is called only when the collection is mutable, and never while
    the module is being initialised (when every collection is mutable).
    """
    if module.is_mutable_collection(MAPS) and not module.is_initializing():
        with cost.tally():  # a picture of the mechanism, and none of its own work
            y = compute()
        module.sow(MAPS, name, y, init_fn=lambda: None, reduce_fn=lambda _, new: new)
