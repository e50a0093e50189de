"""Criss-cross attention: each position attends to its own row and its own column.

The products keep the axes that they have: along one axis of positions the other axes are batch, so
nothing is gathered, and the scores take `n (h + w)` numbers for the n = h w positions.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax import checks
from attention_jax.functional import cost
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import statistics_type


def criss_cross_attend(
    query: jax.Array, key: jax.Array, value: jax.Array, *, spatial_dims: int = 2
) -> jax.Array:
    """Weighted sum of the values on the lines through each position, one line an axis.

    For two axes, with one softmax over all entries of both lines::

        E[i, j, k] = q[i, j] . key[k, j]          k != i, over the column
        F[i, j, l] = q[i, j] . key[i, l]          over the row, the own position included
        y[i, j] = sum_k P[i, j, k] v[k, j] + sum_l R[i, j, l] v[i, l]      P, R = softmax(E, F)

    Three axes add a third line in the same way: the own position counts once, on the line along the
    last axis. There is no scale. Ordinary autodiff: forward mode works, and the gradient keeps the
    weights, `n (h + w)` numbers.

    Args:
        query: `[..., *spatial, d]`.
        key: `[..., *spatial, d]`.
        value: `[..., *spatial, e]`.
        spatial_dims: number of axes of positions, 2 or 3.

    Returns:
        `[..., *spatial, e]` in the type of `value`.

    Raises:
        ValueError: shapes that differ, or another number of axes.
    """
    _check(query, key, spatial_dims)
    if value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            f'value must have the positions of query {query.shape[:-1]}, got shape {value.shape}'
        )
    n, sides = math.prod(query.shape[:-1]), query.shape[-1 - spatial_dims : -1]
    cost.add('matmul', n * sum(sides) * (query.shape[-1] + value.shape[-1]))
    weights, total = _weights(query, key, spatial_dims)
    y = sum(
        _lines('{line},{other}->{own}', axis, spatial_dims, p.astype(value.dtype), value)
        for axis, p in enumerate(weights)
    )
    return (y / total[..., None]).astype(value.dtype)


def criss_cross_weights(query: jax.Array, key: jax.Array, *, spatial_dims: int = 2) -> jax.Array:
    """The weights of `criss_cross_attend`, for a picture of them.

    Args:
        query: `[..., *spatial, d]`.
        key: `[..., *spatial, d]`.
        spatial_dims: number of axes of positions, 2 or 3.

    Returns:
        `[..., h, w, h + w]`: the entries of the column first (0 at the own position), then those of
        the row. With three axes `[..., t, h, w, t + h + w]`. In the type of `query`.

    Raises:
        ValueError: as in `criss_cross_attend`.
    """
    _check(query, key, spatial_dims)
    weights, total = _weights(query, key, spatial_dims)
    lines = [jnp.moveaxis(p, -2, axis - spatial_dims - 1) for axis, p in enumerate(weights)]
    return (jnp.concatenate(lines, -1) / total[..., None]).astype(query.dtype)


def _check(query: jax.Array, key: jax.Array, spatial_dims: int) -> None:
    checks.choice('spatial_dims', spatial_dims, (2, 3))
    checks.feature_map(query, spatial_dims, 'query')
    if key.shape != query.shape:
        raise ValueError(f'key must have the shape {query.shape} of query, got {key.shape}')


def _weights(
    query: jax.Array, key: jax.Array, spatial_dims: int
) -> tuple[list[jax.Array], jax.Array]:
    """The softmax without its normaliser, an array a line, and the normaliser `[..., *spatial]`.

    The line along an axis is `[..., *other axes, axis, entries]`, the order in which a product with
    the other axes as batch comes out: only one number a position moves between the lines.
    """
    scores = []
    for axis in range(spatial_dims):
        s = _lines('{own},{other}->{line}', axis, spatial_dims, query, key)
        if axis < spatial_dims - 1:
            own = expand_to(jnp.eye(s.shape[-1], dtype=bool), s)
            s = jnp.where(own, -jnp.inf, s)
        scores.append(s)

    def home(numbers: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(numbers, -1, axis - spatial_dims)

    # Finite: the line along the last axis has no masked entry.
    tops = [home(lax.stop_gradient(s).max(-1), axis) for axis, s in enumerate(scores)]
    top = jnp.stack(tops).max(0)
    weights = [
        jnp.exp(s - jnp.moveaxis(top, axis - spatial_dims, -1)[..., None])
        for axis, s in enumerate(scores)
    ]
    return weights, sum(home(p.sum(-1), axis) for axis, p in enumerate(weights))


def _lines(pattern: str, axis: int, spatial_dims: int, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum between positions on the lines along one axis, with float32 (float64) sums.

    `{own}` stands for a map of features, `{other}` for one whose positions along the axis are the
    entries of a line, `{line}` for the array of the line.
    """
    axes = 'thw'[-spatial_dims:]
    letter = axes[axis]
    subscripts = pattern.format(
        own=f'...{axes}c',
        other=f'...{axes.replace(letter, "k")}c',
        line=f'...{axes.replace(letter, "")}{letter}k',
    )
    return jnp.einsum(subscripts, a, b, preferred_element_type=statistics_type(a.dtype))
