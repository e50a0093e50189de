"""Choosing between branches, channel by channel: the end of selective kernels and ResNeSt."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attention_jax.functional.dtypes import statistics_type
from attention_jax.functional.pooling import spatial_mean


def branch_mean(branches: Sequence[jax.Array]) -> jax.Array:
    """Mean over positions of the sum of the branches.

    Args:
        branches: maps `[..., h, w, c]`.

    Returns:
        `[..., c]`, float32 (float64 if the maps are).
    """
    return sum(spatial_mean(u) for u in branches)


def branch_softmax(branches: Sequence[jax.Array], logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the branches, weighted for each channel by a softmax over the branches.

    The maps are never stacked, and the weighted sum is rounded once.

    Args:
        branches: M maps `[..., h, w, c]`.
        logits: `[..., M, c]`.

    Returns:
        the sum `[..., h, w, c]` in the type of the maps, and the weights `[..., M, c]`, float32
        (float64 if the logits are).

    Raises:
        ValueError: not as many logits as branches.
    """
    if logits.shape[-2] != len(branches):
        raise ValueError(
            f'logits must be [..., {len(branches)}, c] for {len(branches)} branches, '
            f'got shape {logits.shape}'
        )
    weights = jax.nn.softmax(logits.astype(statistics_type(logits.dtype)), axis=-2)
    wide = statistics_type(branches[0].dtype)
    out = sum(
        u.astype(wide) * jnp.expand_dims(weights[..., m, :], (-3, -2)).astype(wide)
        for m, u in enumerate(branches)
    )
    return out.astype(branches[0].dtype), weights
