"""Broadcasting that is said, not left to rank promotion."""

import jax
import jax.numpy as jnp


def expand_to(v: jax.Array, x: jax.Array) -> jax.Array:
    """V with as many axes as x: those that it lacks are put in front, of length 1."""
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


def broadcast_shape(**shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common leading axes of named arrays; a ValueError that lists them if there are none."""
    try:
        return jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        listing = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
        raise ValueError(f'the leading axes do not fit together: {listing}') from None
