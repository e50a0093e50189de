"""What mechanisms between positions share: pools, attention with its map, the sum with a gain."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.initializers import Initializer
from attention_jax.modules.maps import sow_map, wanted_queries


def flatten_positions(x: jax.Array, spatial_dims: int = 2) -> jax.Array:
    """`[..., *spatial, c] -> [..., n, c]`, the positions in row-major order."""
    axes = ('w', 'h w', 't h w')[spatial_dims - 1]
    return rearrange(x, f'... {axes} c -> ... ({axes}) c')


def attend_positions(
    module: nn.Module,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    chunk_size: int | None = None,
    name: str = 'map',
    **options: Any,
) -> jax.Array:
    """`functional.attend` inside a module, which sows the rows of its map that were asked for."""
    checks.at_least('chunk_size', chunk_size, 1)
    sow_map(
        module,
        lambda: functional.attention_weights(wanted_queries(module, query), key, **options),
        name,
    )
    return functional.attend(query, key, value, chunk_size=chunk_size, **options)


def add_gained(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """`x + gamma y` in the type of x, gamma `[1]` a parameter of `module` that starts at 0."""
    return add_scaled(x, y, module.param('gamma', initializers.zeros, (1,), module.param_dtype))


def add_scaled(x: jax.Array, y: jax.Array, gamma: jax.Array) -> jax.Array:
    """`x + gamma y` in the type of x, gamma `[1]`; the sum is rounded once."""
    wide = statistics_type(x.dtype)
    return (x.astype(wide) + gamma[0].astype(wide) * y.astype(wide)).astype(x.dtype)


def logit_scale(scale: str | float | None, channels: int, hidden: int) -> float:
    """What multiplies dot products: 'hidden' `hidden^-0.5`, 'input' `channels^-0.5`, None 1."""
    if isinstance(scale, str):
        checks.choice('scale', scale, ('hidden', 'input'))
        return (hidden if scale == 'hidden' else channels) ** -0.5
    return 1.0 if scale is None else float(scale)


def pool_positions(
    x: jax.Array,
    size: int,
    spatial_dims: int = 2,
    pool: Callable[..., jax.Array] = functional.max_pool,
) -> jax.Array:
    """Pools height and width, and never time, over windows of `size`; 1 is no pool."""
    if size == 1:
        return x
    return pool(x, {1: (size,), 2: (size, size), 3: (1, size, size)}[spatial_dims])


class SimilarityVector(nn.Module):
    """The vector of a learned similarity: a kernel `[rows, 1]`, as `[rows]`."""

    rows: int
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the vector."""
        return self.param('kernel', self.kernel_init, (self.rows, 1), self.param_dtype)[:, 0]


def pair_terms(w: jax.Array, query: jax.Array, key: jax.Array) -> Iterator[jax.Array]:
    """What of `w . [q_i, k_j]`, w `[2 d]`, is each query's and each key's: `[..., n]`, `[..., m]`.

    Float32, or float64 for float64.
    """
    for y, half in zip((query, key), jnp.split(w, 2), strict=True):
        yield functional.contract('...nd,d->...n', y, half.astype(y.dtype), count='macs')
