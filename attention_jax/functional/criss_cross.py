"""Criss-cross attention: each position attends to its own row and its own column.

The products keep the axes that they have: along one axis of positions the other axes are batch, so
nothing is gathered, and the scores take `n (h + w)` numbers for the n = h w positions.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from attention_jax import checks
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.contract import contract


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
    axes = 'thw'[-spatial_dims:]
    weights, total = _weights(query, key, axes)
    y = sum(
        contract(
            f'...{_line(axes, a)}k,...{_entries(axes, a)}c->...{axes}c',
            p.astype(value.dtype),
            value,
        )
        for a, p in weights.items()
    )
    return (y / total[..., None]).astype(value.dtype)


def criss_cross_weights(query: jax.Array, key: jax.Array, *, spatial_dims: int = 2) -> jax.Array:
    """The weights of `criss_cross_attend`, whose arguments and errors these are, for a picture.

    Returns:
        `[..., h, w, h + w]`: the entries of the column first (0 at the own position), then those of
        the row. With three axes `[..., t, h, w, t + h + w]`. In the type of `query`.
    """
    _check(query, key, spatial_dims)
    axes = 'thw'[-spatial_dims:]
    weights, total = _weights(query, key, axes)
    lines = [_moved(p, _line(axes, a) + 'k', axes + 'k') for a, p in weights.items()]
    return (jnp.concatenate(lines, -1) / total[..., None]).astype(query.dtype)


def _check(query: jax.Array, key: jax.Array, spatial_dims: int) -> None:
    checks.choice('spatial_dims', spatial_dims, (2, 3))
    checks.feature_map(query, spatial_dims, 'query')
    if key.shape != query.shape:
        raise ValueError(f'key must have the shape {query.shape} of query, got {key.shape}')


def _weights(query: jax.Array, key: jax.Array, axes: str) -> tuple[dict[str, jax.Array], jax.Array]:
    """The softmax without its normaliser, axis -> its lines, and the normaliser `[..., *spatial]`.

    Only one number a position moves between the lines.
    """
    scores = {}
    for a in axes:
        pattern = f'...{axes}c,...{_entries(axes, a)}c->...{_line(axes, a)}k'
        scores[a] = contract(pattern, query, key)
        if a != axes[-1]:
            own = expand_to(jnp.eye(scores[a].shape[-1], dtype=bool), scores[a])
            scores[a] = jnp.where(own, -jnp.inf, scores[a])

    def home(numbers: jax.Array, a: str) -> jax.Array:
        return _moved(numbers, _line(axes, a), axes)

    # Finite: the line along the last axis has no masked entry.
    tops = [home(lax.stop_gradient(s).max(-1), a) for a, s in scores.items()]
    top = jnp.stack(tops).max(0)
    weights = {
        a: jnp.exp(s - _moved(top, axes, _line(axes, a))[..., None]) for a, s in scores.items()
    }
    return weights, sum(home(p.sum(-1), a) for a, p in weights.items())


def _line(axes: str, a: str) -> str:
    """The lines along axis a: it comes last, as a product with the others as batch leaves it."""
    return axes.replace(a, '') + a


def _entries(axes: str, a: str) -> str:
    """A map whose positions along axis a are the entries k of a line."""
    return axes.replace(a, 'k')


def _moved(x: jax.Array, axes: str, order: str) -> jax.Array:
    """The last axes in another order, a letter each."""
    return rearrange(x, f'... {" ".join(axes)} -> ... {" ".join(order)}')
