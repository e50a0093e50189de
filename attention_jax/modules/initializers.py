"""How parameters start: PyTorch's defaults, and He et al.'s."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax.functional.dtypes import Dtype

Initializer = Callable[..., jax.Array]


torch_kernel: Initializer = initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
"""PyTorch's default for convolutions and linear layers: U(+-1/sqrt(fan_in))."""


kaiming_fan_out: Initializer = initializers.variance_scaling(2.0, 'fan_out', 'normal')
"""He et al. 2015: N(0, 2/(window * c_out)), not truncated."""


def torch_bias(fan_in: int) -> Initializer:
    """PyTorch's default for a bias: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
