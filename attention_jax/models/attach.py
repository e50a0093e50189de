"""A mechanism inside a network: as it is, or so that it starts as nothing; or around a block."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.nn import initializers

from attention_jax.functional.dtypes import statistics_type
from attention_jax.models.placement import Placement
from attention_jax.modules.registry import starts_as_identity


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
    if not identity_init or starts_as_identity(module):
        return y
    alpha = parent.param(f'{name}_alpha', initializers.zeros, (1,), parent.param_dtype)
    wide = statistics_type(x.dtype)
    start, change = x.astype(wide), y.astype(wide) - x.astype(wide)
    return (start + alpha[0].astype(wide) * change).astype(x.dtype)


def run_block(
    parent: nn.Module,
    block: Callable[..., nn.Module],
    x: jax.Array,
    stage: int,
    index: int,
    *,
    placement: Placement | None,
    build: Callable[..., nn.Module] | None,
    train: bool,
) -> jax.Array:
    """Applies a block of a network, and the mechanisms that stand before and after it.

    Args:
        parent: network whose compact method this is called from; it has `identity_init`.
        block: builds the block, given `name`, `attention` and `where`.
        x: `[..., h, w, c]`.
        stage: counted from 0.
        index: of the block in the stage, counted from 0.
        placement: of the mechanism, or None.
        build: builds the mechanism, given its name.
        train: passed on.

    Returns:
        `[..., h', w', c']`.
    """
    name = f'stage{stage + 1}_block{index}'
    for where in ('before_block', None, 'after_block', 'stage'):
        if where is None:
            inside = placement and placement.inside(stage, index)
            x = block(name=name, attention=build, where=inside)(x, train=train)
        elif placement and placement.at(where, stage, index):
            x = attach(
                parent,
                build,
                f'{name}_{where}_attention',
                x,
                train=train,
                identity_init=parent.identity_init,
            )
    return x
