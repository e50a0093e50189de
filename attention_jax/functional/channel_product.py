"""Attention between channels: products over the positions, a map of channels by channels.

Linear in the number of positions; nothing here has two axes of them. The positions stay the axes
they are: folded into one, a TPU copies the whole tensor.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from attention_jax import checks
from attention_jax.functional.contract import contract
from attention_jax.functional.dot_product import WEIGHTINGS
from attention_jax.functional.dtypes import statistics_type


def channel_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    spatial_dims: int = 2,
    heads: int = 1,
    similarity: str = 'dot',
    weighting: str = 'softmax',
    scale: float = 1.0,
) -> jax.Array:
    """Weights of channels for channels, `P_ij = weighting_j(scale sum_n q_ni k_nj)`.

    The products are sums over all positions, float32 at the highest precision whatever the default
    is: unscaled logits grow with the number of positions, and bfloat16 has no digits for their
    differences.

    Args:
        query: `[..., *spatial, d]`.
        key: `[..., *spatial, d]`.
        spatial_dims: number of axes of positions, 1 to 3.
        heads: groups of consecutive channels; channels meet within a group only.
        similarity: 'dot', or 'cosine', the product divided by the two lengths over the positions
            (a length under 1e-12 counts as that).
        weighting: 'softmax' over the last axis; 'sigmoid'; 'mean', `S / (d / heads)`; 'none', `S`.
        scale: factor of S.

    Returns:
        `[..., d, d]`, with several heads `[..., heads, d / heads, d / heads]`; rows are channels of
        the query. float32, or float64 for float64.

    Raises:
        ValueError: an unknown name, heads that do not divide d, or shapes that differ.
    """
    checks.choice('similarity', similarity, ('dot', 'cosine'))
    checks.choice('weighting', weighting, WEIGHTINGS)
    if query.shape != key.shape:
        raise ValueError(f'key must have the shape {query.shape} of query, got {key.shape}')
    axes, group = 'thw'[-spatial_dims:], 'g' if heads > 1 else ''
    query, key = _heads(query, heads), _heads(key, heads)
    pattern = f'...{axes}{group}i,...{axes}{group}j->...{group}ij'
    s = contract(pattern, query, key, precision=lax.Precision.HIGHEST)
    if similarity == 'cosine':
        over = tuple(range(-len(axes) - 1 - len(group), -1 - len(group)))
        q, k = (_inverse_length(y, over) for y in (query, key))
        s = s * q[..., :, None] * k[..., None, :]
    s = s * scale
    if weighting == 'softmax':
        return jax.nn.softmax(s, -1)
    if weighting == 'sigmoid':
        return jax.nn.sigmoid(s)
    return s / s.shape[-1] if weighting == 'mean' else s


def mix_channels(
    weights: jax.Array, value: jax.Array, *, spatial_dims: int = 2, heads: int = 1
) -> jax.Array:
    """`y_ni = sum_j P_ij v_nj` at every position.

    Args:
        weights: P, as `channel_weights` gives it.
        value: `[..., *spatial, d]`.
        spatial_dims: number of axes of positions, 1 to 3.
        heads: groups of consecutive channels.

    Returns:
        `[..., *spatial, d]` in the type of `value`.

    Raises:
        ValueError: heads that do not divide d.
    """
    axes, group = 'thw'[-spatial_dims:], 'g' if heads > 1 else ''
    pattern = f'...{group}ij,...{axes}{group}j->...{axes}{group}i'
    y = contract(pattern, weights.astype(value.dtype), _heads(value, heads)).astype(value.dtype)
    return y if heads == 1 else rearrange(y, '... g i -> ... (g i)')


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """`[..., d] -> [..., heads, d / heads]`; one head has no axis."""
    checks.divides('heads', heads, 'the features', x.shape[-1])
    return x if heads == 1 else rearrange(x, '... (g i) -> ... g i', g=heads)


def _inverse_length(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """1 / max(|x|, 1e-12) over the positions; finite gradients where x is 0."""
    square = jnp.square(x.astype(statistics_type(x.dtype))).sum(axes)
    return lax.rsqrt(jnp.maximum(square, 1e-24))
