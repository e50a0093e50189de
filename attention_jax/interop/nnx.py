"""Linen modules and their variables as NNX modules, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util


def to_nnx(
    module: nn.Module, variables: Mapping[str, Any], *inputs: Any, rngs: nnx.Rngs | None = None
) -> nnx.Module:
    """Turns a mechanism or network with its weights into an NNX module.

    In training call it with `mutable`, so that the statistics of norms are updated::

        model = to_nnx(module, variables, x, rngs=nnx.Rngs(dropout=0))
        logits = model(x, train=True, mutable=['batch_stats'])

    Args:
        module: a Linen module of this package.
        variables: its variables, every collection.
        *inputs: what it is called with, arrays or shapes: the variables must fit them.
        rngs: random streams that training draws from: 'dropout' for dropout and stochastic depth.

    Returns:
        An `nnx.bridge.ToNNX` that holds the same arrays: parameters as `nnx.Param`, batch
        statistics as `nnx.BatchStat`, any other collection as the variable type of its name.

    Raises:
        ValueError: variables that are missing, left over or of another shape.
    """
    given = traverse_util.flatten_dict(dict(variables))
    wanted = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    wrong = [
        '/'.join(path)
        for path in {**wanted, **given}
        if path not in given or path not in wanted or given[path].shape != wanted[path].shape
    ]
    if wrong:
        more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(
            f'variables do not fit the module and inputs: {", ".join(wrong[:10])}{more} are '
            'missing, left over or of another shape'
        )
    model = nnx.bridge.ToNNX(module, rngs=rngs)
    attributes = traverse_util.unflatten_dict(
        {path[1:]: _variable_type(path[0])(jnp.asarray(value)) for path, value in given.items()}
    )
    for name, value in attributes.items():
        setattr(model, name, nnx.data(value))
    return model


def from_nnx(model: nnx.Module) -> dict[str, Any]:
    """Returns the Linen variables of a module that `to_nnx` made, as they are now."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return traverse_util.unflatten_dict(
        {
            (nnx.variable_name_from_type(type(variable)), *path): variable.get_value()
            for path, variable in state
        }
    )


def _variable_type(collection: str) -> type[nnx.Variable]:
    return nnx.variable_type_from_name(collection, allow_register=True)
