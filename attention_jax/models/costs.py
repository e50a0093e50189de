"""Parameters and multiply-accumulates of a network, from shapes: nothing is computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from attention_jax.functional import cost


def costs(module: nn.Module, *input_shapes: Sequence[int]) -> dict[str, int]:
    """Counts a module's parameters and multiply-accumulates from abstract shapes.

    Args:
        module: any Linen module.
        *input_shapes: shapes of its inputs, e.g. `(1, 224, 224, 3)`: batch 1 counts one image.

    Returns:
        `parameters` (trainable ones), `macs` (convolutions and dense layers: outputs * window *
        c_in / groups) and `matmul` (products between two activations).
    """
    return _trace(module, input_shapes)[1]


def parameter_table(module: nn.Module, *input_shapes: Sequence[int]) -> str:
    """The table of a module's arrays, with its parameters and MACs at the given inputs below.

    Args:
        module: any Linen module.
        *input_shapes: shapes of its inputs; batch 1 counts one image.

    Returns:
        Text, a line an array: path, shape, type and number of entries; then the totals.
    """
    variables, counts = _trace(module, input_shapes)
    rows = [('array', 'shape', 'type', 'entries')]
    for path, leaf in traverse_util.flatten_dict(variables, sep='/').items():
        shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
        rows.append((path, shape, str(leaf.dtype), f'{math.prod(leaf.shape):,}'))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    last = max(len(row[3]) for row in rows)
    lines = [
        '  '.join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3].rjust(last)])  # noqa: B905
        for row in rows
    ]
    rule = '-' * len(lines[0])
    inputs = ' and '.join('x'.join(map(str, shape)) for shape in input_shapes)
    totals = [
        f'{counts["parameters"]:,} parameters (running statistics are none)',
        f'{counts["macs"]:,} MACs of convolutions and dense layers at {inputs}',
        f'{counts["matmul"]:,} MACs of products between activations',
    ]
    return '\n'.join([lines[0], rule, *lines[1:], rule, *totals])


def _trace(
    module: nn.Module, input_shapes: Sequence[Sequence[int]]
) -> tuple[Mapping[str, Any], dict[str, int]]:
    """The shapes of a module's variables, and what `costs` returns."""
    inputs = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in input_shapes]
    with cost.tally() as counts:
        # A new function each time: what JAX has traced before it does not trace, nor count, again.
        variables = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get('params', {})))
    return variables, {'parameters': parameters, **counts}
