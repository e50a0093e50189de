"""Types of arrays, and the type that sums of them are kept in."""

from typing import Any

import jax.numpy as jnp

Dtype = Any


def statistics_type(dtype: Dtype) -> jnp.dtype:
    """The type in which sums and statistics of `dtype` are kept: float32, or float64 for itself."""
    return jnp.promote_types(dtype, jnp.float32)
