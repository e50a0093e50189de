"""Non-local's concatenation similarity without an array of pairs, by sorting."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import checks
from attention_jax.functional import cost
from attention_jax.functional.broadcast import broadcast_shape
from attention_jax.functional.dtypes import statistics_type

Pair = tuple[jax.Array, jax.Array]


def pairwise_relu_attend(a: jax.Array, b: jax.Array, value: jax.Array) -> jax.Array:
    """`y_i = (1/m) sum_j relu(a_i + b_j) v_j`: non-local's concatenation, with no array of pairs.

    `w . [q_i, k_j]` is the sum of a number of the query and one of the key, and a relu of such a
    sum is on for the keys of largest b: with the keys sorted, prefix sums hold every y. Time
    `O((n + m)(e + log m))`. A sum of exactly 0 gives nothing to value and gradient. The gradient is
    hand-written (forward mode raises a TypeError) and is the same computation with a and b
    exchanged.

    Args:
        a: `[..., n]`.
        b: `[..., m]`.
        value: `[..., m, e]`.

    Returns:
        `[..., n, e]` in the type of `value`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if value.ndim < 2 or b.ndim < 1 or a.ndim < 1 or b.shape[-1] != value.shape[-2]:
        raise ValueError(
            'b [..., m] and value [..., m, e] must have the same m, '
            f'got shapes {b.shape} and {value.shape} (a: {a.shape})'
        )
    n, (m, e) = a.shape[-1], value.shape[-2:]
    checks.at_least('the number of keys (the last axis of b)', m, 1)
    batch = broadcast_shape(a=a.shape[:-1], b=b.shape[:-1], value=value.shape[:-2])
    a, b = jnp.broadcast_to(a, (*batch, n)), jnp.broadcast_to(b, (*batch, m))
    rows = jnp.broadcast_to(value, (*batch, m, e))
    compute = statistics_type(jnp.result_type(a, b, value))
    cost.add('matmul', math.prod(batch) * (n + m) * e)
    y = _pairwise_relu(a.astype(compute), b.astype(compute), rows.astype(compute))
    return y.astype(value.dtype)


@jax.custom_vjp
def _pairwise_relu(a: jax.Array, b: jax.Array, rows: jax.Array) -> jax.Array:
    return _pairwise_relu_forward(a, b, rows)[0]


def _pairwise_relu_forward(a: jax.Array, b: jax.Array, rows: jax.Array) -> tuple[jax.Array, Any]:
    plain, weighted = _sums_above(a, b, rows)
    return weighted / rows.shape[-2], (a, b, rows, plain)


def _pairwise_relu_backward(residuals: Any, g: jax.Array) -> Pair:
    a, b, rows, plain = residuals
    m = rows.shape[-2]
    plain_g, weighted_g = _sums_above(b, a, g)
    return (g * plain).sum(-1) / m, (rows * plain_g).sum(-1) / m, weighted_g / m


_pairwise_relu.defvjp(_pairwise_relu_forward, _pairwise_relu_backward)


def _sums_above(a: jax.Array, b: jax.Array, rows: jax.Array) -> Pair:
    """`sum_j [a_i + b_j > 0] rows_j` and `sum_j relu(a_i + b_j) rows_j`, both `[..., n, e]`."""
    order = jnp.argsort(-b, -1)
    falling = jnp.take_along_axis(b, order, -1)
    sorted_rows = jnp.take_along_axis(rows, order[..., None], -2)
    # Prefix sums lose digits where b is far from 0: weigh by b - mean(b), which a makes good.
    offset = b.mean(-1, keepdims=True)
    both = jnp.concatenate([sorted_rows, (falling - offset)[..., None] * sorted_rows], -1)
    sums = jnp.pad(jnp.cumsum(both, -2), [(0, 0)] * (b.ndim - 1) + [(1, 0), (0, 0)])
    count = _counts_below(-falling, a)
    plain, weighted = jnp.split(jnp.take_along_axis(sums, count[..., None], -2), 2, -1)
    return plain, (a + offset)[..., None] * plain + weighted


def _counts_below(rising: jax.Array, limits: jax.Array) -> jax.Array:
    """How many of `rising [..., m]` are below each of `limits [..., n]`."""
    count = functools.partial(jnp.searchsorted, side='left')
    flat = jax.vmap(count)(
        rising.reshape(-1, rising.shape[-1]), limits.reshape(-1, limits.shape[-1])
    )
    return flat.reshape(limits.shape)
