"""Covariances of the channels of a map, and their iterative square root.

All of it is float32 (float64 for float64) with products at the highest precision whatever the
default is: a row norm magnifies small covariances, and the iteration diverges in bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from attention_jax import checks
from attention_jax.functional import cost
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import statistics_type

TRIANGLES = ('upper', 'lower')


def covariance(x: jax.Array) -> jax.Array:
    """Biased covariance of the channels over all positions.

    The mean is taken off before the product, position by position: neither `E[xx] - E[x]E[x]`,
    which loses digits, nor the product with an n x n centring matrix, which costs memory.

    Args:
        x: `[..., h, w, d]`.

    Returns:
        `[..., d, d]`, divided by h * w; float32 (float64 if x is).
    """
    h, w, d = x.shape[-3:]
    x = x.astype(statistics_type(x.dtype))
    x = x - x.mean((-3, -2), keepdims=True)
    cost.add('matmul', x.size * d)  # here, as a function with its own derivative is traced once
    return _gram(x) / (h * w)


def square_root(s: jax.Array, iterations: int, *, epsilon: float = 0.0) -> jax.Array:
    """Approximate square root by Newton-Schulz steps (iSQRT-COV, arXiv 1712.01034).

    With `t = trace(s) + epsilon`, `Y = s / t` and `Z = I`, each step does
    `T = (3 I - Z Y) / 2; Y, Z = Y T, T Z`; the result is `sqrt(t) Y`. Few steps do not converge:
    the networks are trained with what 3 or 5 of them give. A zero matrix has the root 0, with
    gradient 0 (the recursion alone would give NaN).

    Args:
        s: symmetric and positive semidefinite, `[..., d, d]`.
        iterations: number of steps, at least 1.
        epsilon: added to the trace.

    Returns:
        `[..., d, d]`, float32 (float64 if s is).

    Raises:
        ValueError: no steps.
    """
    checks.at_least('iterations', iterations, 1)
    s = s.astype(statistics_type(s.dtype))
    d = s.shape[-1]
    trace = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None] + epsilon
    positive = trace > jnp.finfo(s.dtype).tiny
    trace = jnp.where(positive, trace, 1)
    three = jnp.broadcast_to(3 * jnp.eye(d, dtype=s.dtype), s.shape)

    y = s / trace
    t = (three - y) / 2  # Z is still the identity
    y, z = _product(y, t), t
    for step in range(1, iterations):
        t = (three - _product(z, y)) / 2
        y = _product(y, t)
        if step < iterations - 1:
            z = _product(t, z)
    return jnp.where(positive, jnp.sqrt(trace) * y, 0)


def triangle(s: jax.Array, which: str) -> jax.Array:
    """The entries on the diagonal and on one side of it, row by row.

    Args:
        s: `[..., d, d]`.
        which: 'upper', (0, 0), (0, 1), ..., (0, d - 1), (1, 1), ...; or 'lower', (0, 0), (1, 0),
            (1, 1), (2, 0), ...

    Returns:
        `[..., d (d + 1) / 2]`.

    Raises:
        ValueError: an unknown triangle.
    """
    checks.choice('triangle', which, TRIANGLES)
    d = s.shape[-1]
    rows, columns = np.triu_indices(d) if which == 'upper' else np.tril_indices(d)
    flat = rearrange(s, '... i j -> ... (i j)')
    return flat.at[..., rows * d + columns].get(
        unique_indices=True, indices_are_sorted=True, mode='promise_in_bounds'
    )


@jax.custom_jvp
def _gram(x: jax.Array) -> jax.Array:
    """`x^T x`; its gradient `x (G + G^T)` is one product, and not one for each factor."""
    return _inner(x, x)


@_gram.defjvp
def _gram_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    half = _inner(dx, x)
    return _gram(x), half + rearrange(half, '... i j -> ... j i')


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    # Two axes as they are: folding them into one makes a TPU copy both.
    return contract('...hwi,...hwj->...ij', a, b, count=None, precision=lax.Precision.HIGHEST)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return contract('...ij,...jk->...ik', a, b, precision=lax.Precision.HIGHEST)
