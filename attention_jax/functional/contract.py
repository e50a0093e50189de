"""Sums of products, written by letters: the one way in which arrays are multiplied here."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attention_jax.functional import cost
from attention_jax.functional.dtypes import statistics_type


def contract(
    pattern: str,
    a: ArrayLike,
    b: ArrayLike,
    *,
    count: cost.Kind | None = 'matmul',
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Einsum of two arrays in their own type, with float32 (float64) sums and result.

    Its multiply-accumulates, the product of the lengths of all letters, go to an open `cost.tally`.

    Args:
        pattern: as of `jnp.einsum`, such as '...nd,...md->...nm'; '...' comes first.
        a: the first array.
        b: the second array.
        count: 'matmul' for a product of two activations, 'macs' for one with parameters; None for
            one that is counted elsewhere: in the body of a loop, or in what JAX traces once
            and keeps, such as a branch.
        precision: as of `jnp.einsum`; None is JAX's own setting.

    Returns:
        What the pattern says, float32, or float64 for float64.
    """
    if count is not None:
        cost.add(count, _multiply_accumulates(pattern, a, b))
    wide = statistics_type(jnp.result_type(a, b))
    return jnp.einsum(pattern, a, b, precision=precision, preferred_element_type=wide)


def _multiply_accumulates(pattern: str, *arrays: ArrayLike) -> int:
    leading, lengths = (), {}
    for letters, x in zip(pattern.split('->')[0].split(','), arrays, strict=True):
        named = letters.removeprefix('...')
        first = jnp.ndim(x) - len(named)
        leading = jnp.broadcast_shapes(leading, jnp.shape(x)[:first])
        for letter, length in zip(named, jnp.shape(x)[first:], strict=True):
            if lengths.get(letter, 1) == 1:  # einsum broadcasts axes of length 1
                lengths[letter] = length
    return math.prod(leading) * math.prod(lengths.values())
