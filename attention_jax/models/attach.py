"""A mechanism inside a network: applied as it is, or so that it starts as nothing."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.nn import initializers

from attention_jax import registry
from attention_jax.functional.normalization import statistics_type


def attach(
    parent: nn.Module,
    build: Callable[..., nn.Module],
    name: str,
    x: jax.Array,
    *,
    train: bool,
    identity_init: bool,
) -> jax.Array:
    """Applies a mechanism that keeps the shape of x, as a child of `parent`.

    With F the mechanism and alpha `[1]` a parameter `NAME_alpha` of the parent that starts at 0,
    `identity_init` gives `x + alpha (F(x) - x)`: a trained network that it is put into computes at
    first what it did before. A mechanism that starts as the identity by itself is left alone.

    Args:
        parent: module whose compact method this is called from.
        build: builds the mechanism, given its name.
        name: of the mechanism's variables in the parent.
        x: `[..., h, w, c]`.
        train: passed on.
        identity_init: starts as the identity.

    Returns:
        `[..., h, w, c]`.
    """
    module = build(name=name)
    y = module(x, train=train)
    if not identity_init or registry.starts_as_identity(module):
        return y
    alpha = parent.param(f'{name}_alpha', initializers.zeros, (1,), parent.param_dtype)
    wide = statistics_type(x.dtype)
    start, change = x.astype(wide), y.astype(wide) - x.astype(wide)
    return (start + alpha[0].astype(wide) * change).astype(x.dtype)
