"""The few layers that every mechanism and network stands on.

Types: they compute in the input's type (parameters are cast to it), so a bfloat16 input gives a
bfloat16 output. Statistics, softmax and gates are float32 inside, float64 for float64.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.functional.normalization import batch_norm, normalize
from attention_jax.modules.initializers import Initializer, torch_bias, torch_kernel


class Dense(nn.Module):
    """Linear layer over the last axis, `[..., c] -> [..., features]`: a 1x1 convolution on a map.

    Attributes:
        features: output width.
        use_bias: adds a bias.
        kernel_init: initialiser of the kernel `[c, features]`; default PyTorch's.
        bias_init: initialiser of the bias `[features]`; None is PyTorch's, U(+-1/sqrt(c)).
        param_dtype: type of the parameters.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = torch_kernel
    bias_init: Initializer | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `[..., c]`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
        return _with_bias(self, functional.dense(x, kernel.astype(x.dtype)), fan_in=shape[0])


class Conv(nn.Module):
    """Convolution `[..., *spatial, c] -> [..., *spatial, features]`, symmetric zero padding.

    Attributes:
        features: output width.
        kernel_size: window, one length a spatial axis.
        strides: strides, one for all axes or one an axis.
        padding: None pads `(k - 1) // 2 * dilation` on both sides, as PyTorch networks do (never
            'SAME', another function when strided); or what `functional.conv` takes.
        dilation: dilation, one for all axes or one an axis.
        groups: groups of channels.
        use_bias: adds a bias.
        kernel_init: initialiser of the kernel `[*window, c / groups, features]`; default PyTorch's.
        bias_init: initialiser of the bias; None is PyTorch's, U(+-1/sqrt(fan_in)).
        param_dtype: type of the parameters.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: int | tuple[int, ...] = 1
    padding: Any = None
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = torch_kernel
    bias_init: Initializer | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the convolution to `[..., *spatial, c]`."""
        c = x.shape[-1]
        checks.divides('groups', self.groups, 'the channels', c)
        shape = (*self.kernel_size, c // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
        y = functional.conv(
            x,
            kernel.astype(x.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return _with_bias(self, y, fan_in=math.prod(shape[:-1]))


def _with_bias(layer: Dense | Conv, y: jax.Array, fan_in: int) -> jax.Array:
    if not layer.use_bias:
        return y
    init = layer.bias_init or torch_bias(fan_in)
    bias = layer.param('bias', init, (layer.features,), layer.param_dtype)
    return y + expand_to(bias.astype(y.dtype), y)


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch computes it, over all axes but the last.

    It normalises by the biased variance and stores the unbiased one, `n / (n - 1)` times larger,
    in the running statistics (`flax.linen.BatchNorm` stores the biased one). Under a sharded batch
    the statistics are those of the whole batch.

    Attributes:
        momentum: of the running statistics in Flax's sense (1 - PyTorch's).
        epsilon: added to the variance.
        scale_init: initialiser of the scale `[c]`.
        param_dtype: type of the parameters.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = initializers.ones
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalises `[..., c]`, with the batch's statistics if `train`, else the running ones.

        Raises:
            ValueError: one value per channel in training, where the output would be the bias.
        """
        features = (x.shape[-1],)
        compute = statistics_type(x.dtype)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, features, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, features, jnp.float32)
        scale = self.param('scale', self.scale_init, features, self.param_dtype)
        bias = self.param('bias', initializers.zeros, features, self.param_dtype)

        if not train or self.is_initializing():
            values = (running_mean.value, running_var.value, scale, bias)
            y = normalize(x.astype(compute), *(v.astype(compute) for v in values), self.epsilon)
            return y.astype(x.dtype)
        count = math.prod(x.shape[:-1])
        if count == 1:
            raise ValueError(
                f'batch normalisation in training needs more than one value per channel, got '
                f'x of shape {x.shape}: use a larger batch, or train=False'
            )
        y, mean, var = batch_norm(x, scale, bias, shift=running_mean.value, epsilon=self.epsilon)
        old, new = self.momentum, 1 - self.momentum
        for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            running.value = old * running.value + new * value.astype(running.value.dtype)
        return y.astype(x.dtype)


class StochasticDepth(nn.Module):
    """Drops the whole input of some examples in training: the residual branch of a block.

    Source: Huang et al. 2016, arXiv 1603.09382, in the form that PyTorch networks use: what is kept
    is divided by the probability of being kept, so that evaluation changes nothing.

    Attributes:
        rate: probability that an example is dropped, 0 to 1, 1 excluded.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Drops examples of `[b, ...]`; needs the random stream `dropout` in training."""
        axes = tuple(range(1, x.ndim))
        return nn.Dropout(self.rate, broadcast_dims=axes, deterministic=not train)(x)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in two passes and in float32 or float64.

    Attributes:
        epsilon: added to the variance (PyTorch's default 1e-5; Flax's is 1e-6).
        param_dtype: type of the parameters.
    """

    epsilon: float = 1e-5
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., c]`."""
        features = (x.shape[-1],)
        compute = statistics_type(x.dtype)
        scale = self.param('scale', initializers.ones, features, self.param_dtype)
        bias = self.param('bias', initializers.zeros, features, self.param_dtype)
        y = x.astype(compute)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y = y * expand_to(scale.astype(compute), x) + expand_to(bias.astype(compute), x)
        return y.astype(x.dtype)
