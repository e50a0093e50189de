"""Reading a learned memory with many heads, for a device whose memory is the limit.

The weights of all heads are many times as large as the map that they are of. Here they are computed
again wherever they are summed, and no array of them is kept in float32: on a TPU a product that is
summed while it is made costs less than to write and read its result.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from attention_jax.functional.contract import contract

Arrays = tuple[jax.Array, ...]
_POSITIONS = (1, 2)  # height and width in [b, h, w, g, k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def read_memory(x: jax.Array, key: jax.Array, value: jax.Array, epsilon: float) -> jax.Array:
    """Reads g memories of k units at every position, doubly normalised.

    With `S = softmax_hw(x key)`, over the positions, and `A = S / (epsilon + sum_k S)`, the result
    is `y = sum_gk A value`. A bias of the logits would cancel. Reverse mode only.

    Args:
        x: `[b, h, w, c]`.
        key: `[c, g, k]`.
        value: `[g, k, o]`.
        epsilon: of the second normalisation.

    Returns:
        `[b, h, w, o]` in the type of x.
    """
    return _forward(x, key, value, epsilon)[0]


def _forward(
    x: jax.Array, key: jax.Array, value: jax.Array, epsilon: float
) -> tuple[jax.Array, Arrays]:
    top = _logits(x, key).max(_POSITIONS, keepdims=True)
    x, top = _after(x, top)
    total = jnp.exp(_logits(x, key) - top).sum(_POSITIONS, keepdims=True)
    x, total = _after(x, total)
    soft = _softmax(key, top, total)
    sums = epsilon + soft(x).sum(-1, keepdims=True)
    x, sums = _after(x, sums)
    y = _product('bhwgk,gko->bhwo', (soft(x) / sums).astype(x.dtype), value)
    return y.astype(x.dtype), (x, key, value, top, total, sums)


def _backward(epsilon: float, residuals: Arrays, g: jax.Array) -> Arrays:
    del epsilon
    x, key, value, top, total, sums = residuals
    soft = _softmax(key, top, total)
    # By the weights A; the one array of their size that is read several times.
    by_weights = _product('bhwo,gko->bhwgk', g, value).astype(x.dtype)
    mean = (by_weights * (soft(x) / sums)).sum(-1, keepdims=True)
    by_soft = lambda: (by_weights - mean) / sums  # noqa: E731
    x, mean = _after(x, mean)
    shared = (soft(x) * by_soft()).sum(_POSITIONS, keepdims=True)
    x, shared = _after(x, shared)
    by_logits = (soft(x) * (by_soft() - shared)).astype(x.dtype)
    dx = _product('bhwgk,cgk->bhwc', by_logits, key).astype(x.dtype)
    dkey = rearrange(_product('bhwgk,bhwc->gkc', by_logits, x), 'g k c -> c g k')
    x, dkey = _after(x, dkey)
    dvalue = _product('bhwgk,bhwo->gko', (soft(x) / sums).astype(x.dtype), g)
    return dx, dkey.astype(key.dtype), dvalue.astype(value.dtype)


read_memory.defvjp(_forward, _backward)


def _logits(x: jax.Array, key: jax.Array) -> jax.Array:
    return _product('bhwc,cgk->bhwgk', x, key)


def _softmax(key: jax.Array, top: jax.Array, total: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.exp(_logits(x, key) - top) / total


def _product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In the type of the map; the caller of `read_memory` counts, which is traced once."""
    return contract(pattern, a, b.astype(a.dtype), count=None)


def _after(x: jax.Array, result: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are; what is computed from this x waits, and is not shared with what was."""
    return lax.optimization_barrier((x, result))
