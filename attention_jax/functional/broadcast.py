"""Broadcasting that is said, not left to rank promotion."""

import jax


def expand_to(v: jax.Array, x: jax.Array) -> jax.Array:
    """V with as many axes as x: those that it lacks are put in front, of length 1."""
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)
