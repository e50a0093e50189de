"""What gates are made of: activations and gates by name, squeezes, the product, a plane's gate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.initializers import kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv

Function = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Function] = {
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'tanh': jnp.tanh,
    'identity': lambda x: x,
}

GATES: dict[str, Function] = {'sigmoid': jax.nn.sigmoid, 'hard_sigmoid': jax.nn.hard_sigmoid}


def activation(name: str, **more: Function) -> Function:
    """Returns an activation of `ACTIVATIONS` or `more`; a ValueError names the argument."""
    checks.choice('activation', name, ACTIVATIONS | more)
    return (ACTIVATIONS | more)[name]


def gate(name: str, **more: Function) -> Function:
    """Returns a gate, a function into [0, 1], of `GATES` or `more`; a ValueError names `gate`."""
    checks.choice('gate', name, GATES | more)
    return (GATES | more)[name]


def squeeze(name: str, x: jax.Array) -> jax.Array:
    """The mean over positions, `[..., c]`; by 'average_max' half of it plus half the maximum."""
    checks.choice('squeeze', name, ('average', 'average_max'))
    if name == 'average':
        return functional.spatial_mean(x)
    return 0.5 * sum(functional.spatial_mean_and_max(x))


def rescale(x: jax.Array, g: jax.Array) -> jax.Array:
    """`x * g` in the type of x; g `[..., c]` gates channels of x `[..., h, w, c]`.

    A gate with as many axes as x is multiplied as it is. The product is rounded once, and the
    gate's gradient is a float32 sum, which a TPU computes in one pass with the mean of x.
    """
    if g.ndim < x.ndim:
        g = jnp.expand_dims(g, tuple(range(g.ndim - 1, x.ndim - 1)))
    wide = statistics_type(x.dtype)
    return (x.astype(wide) * g.astype(wide)).astype(x.dtype)


class PlaneGate(nn.Module):
    """The spatial gate of CBAM and Triplet: `sigmoid(norm(conv(z)))` on a plane, `[..., a, b, 1]`.

    Its fields are those of `CBAMSpatial`.
    """

    kernel_size: int = 7
    conv_bias: bool = False
    conv_norm: bool = True
    norm_momentum: float = 0.99
    norm_eps: float = 1e-5
    norm_scale_init: float = 0.0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the plane `[..., a, b, q]` of q descriptors."""
        checks.odd('kernel_size', self.kernel_size)
        z = Conv(
            features=1,
            kernel_size=(self.kernel_size, self.kernel_size),
            use_bias=self.conv_bias,
            kernel_init=kaiming_fan_out,
            bias_init=initializers.zeros,
            param_dtype=self.param_dtype,
            name='conv',
        )(z)
        if self.conv_norm:
            z = BatchNorm(
                momentum=self.norm_momentum,
                epsilon=self.norm_eps,
                scale_init=initializers.constant(self.norm_scale_init),
                param_dtype=self.param_dtype,
                name='norm',
            )(z, train=train)
        return jax.nn.sigmoid(z)
