"""The few layers that every mechanism and network stands on.

Types: `dtype=None` computes in the input's type (parameters are cast to it), so a bfloat16 input
gives a bfloat16 output. Statistics, softmax and gates are float32 inside, float64 for float64.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.normalization import batch_norm, normalize, statistics_type

Initializer = Callable[..., jax.Array]
Dtype = Any

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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'tanh': jnp.tanh,
    'identity': lambda x: x,
}
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    'sigmoid': jax.nn.sigmoid,
    'hard_sigmoid': jax.nn.hard_sigmoid,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns an activation by name; a ValueError names the argument `activation`."""
    checks.choice('activation', name, ACTIVATIONS)
    return ACTIVATIONS[name]


def gate(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns a gate, a function into [0, 1], by name; a ValueError names the argument `gate`."""
    checks.choice('gate', name, GATES)
    return GATES[name]


def rescale(x: jax.Array, g: jax.Array) -> jax.Array:
    """`x * g` in the type of x; g `[..., c]` gates channels of x `[..., h, w, c]`.

    A gate with as many axes as x is multiplied as it is. The product is rounded once, and the
    gate's gradient is a float32 sum, which a TPU computes in one pass with the mean of x.
    """
    if g.ndim < x.ndim:
        g = jnp.expand_dims(g, tuple(range(g.ndim - 1, x.ndim - 1)))
    wide = statistics_type(x.dtype)
    return (x.astype(wide) * g.astype(wide)).astype(x.dtype)


def hidden_width(
    channels: int,
    *,
    reduction: int,
    hidden: int | None = None,
    divisor: int | None = None,
    minimum: int | None = None,
    guard: bool = False,
    prefix: str = '',
) -> int:
    """Width of a bottleneck: `hidden`, or `channels` divided by `reduction`.

    Args:
        channels: width to be reduced.
        reduction: divisor, rounded down (the papers' convention).
        hidden: the width itself; wins over everything else.
        divisor: rounds `channels / reduction` to the nearest multiple, at least one (timm).
        minimum: lower bound of the result.
        guard: with `divisor`, one more step up if rounding lost over 10 % (MobileNetV3, timm).
        prefix: of the two arguments' names in messages, e.g. 'value_'.

    Raises:
        ValueError: a width below 1, or `reduction` below 1.
    """
    if hidden is not None:
        checks.at_least(f'{prefix}hidden', hidden, 1)
        return hidden
    checks.at_least(f'{prefix}reduction', reduction, 1)
    if divisor is None:
        width = channels // reduction if minimum is None else max(channels // reduction, minimum)
        if width < 1:
            raise ValueError(
                f'{prefix}reduction {reduction} leaves no width for {channels} channels: '
                f'use a reduction of at most {channels}, or give {prefix}hidden'
            )
        return width
    checks.at_least('hidden_divisor', divisor, 1)
    exact = channels / reduction
    width = max(minimum or divisor, int(exact + divisor / 2) // divisor * divisor)
    return width + divisor if guard and width < 0.9 * exact else width


class Dense(nn.Module):
    """Linear layer over the last axis, `[..., c] -> [..., features]`: a 1x1 convolution on a map.

    Attributes:
        features: output width.
        use_bias: adds a bias.
        kernel_init: initialiser of the kernel `[c, features]`; default PyTorch's.
        bias_init: initialiser of the bias `[features]`; None is PyTorch's, U(+-1/sqrt(c)).
        dtype: type of the computation and the output; None is the input's.
        param_dtype: type of the parameters.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = torch_kernel
    bias_init: Initializer | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `[..., c]`."""
        dtype = self.dtype or x.dtype
        c = x.shape[-1]
        kernel = self.param('kernel', self.kernel_init, (c, self.features), self.param_dtype)
        y = functional.dense(x.astype(dtype), kernel.astype(dtype))
        if self.use_bias:
            bias_init = self.bias_init or torch_bias(c)
            bias = self.param('bias', bias_init, (self.features,), self.param_dtype)
            y = y + expand_to(bias.astype(dtype), y)
        return y


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
        dtype: type of the computation and the output; None is the input's.
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
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the convolution to `[..., *spatial, c]`."""
        dtype = self.dtype or x.dtype
        c = x.shape[-1]
        checks.divides('groups', self.groups, 'the channels', c)
        shape = (*self.kernel_size, c // self.groups, self.features)
        kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
        y = functional.conv(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            bias_init = self.bias_init or torch_bias(math.prod(shape[:-1]))
            bias = self.param('bias', bias_init, (self.features,), self.param_dtype)
            y = y + expand_to(bias.astype(dtype), y)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch computes it, over all axes but the last.

    It normalises by the biased variance and stores the unbiased one, `n / (n - 1)` times larger,
    in the running statistics (`flax.linen.BatchNorm` stores the biased one). Under a sharded batch
    the statistics are those of the whole batch.

    Attributes:
        momentum: of the running statistics in Flax's sense (1 - PyTorch's).
        epsilon: added to the variance.
        scale_init: initialiser of the scale `[c]`.
        bias_init: initialiser of the bias `[c]`.
        dtype: type of the output; None is the input's. Statistics are float32 or float64.
        param_dtype: type of the parameters.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = initializers.ones
    bias_init: Initializer = initializers.zeros
    dtype: Dtype = None
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
        bias = self.param('bias', self.bias_init, features, self.param_dtype)

        dtype = self.dtype or x.dtype
        if not train or self.is_initializing():
            values = (running_mean.value, running_var.value, scale, bias)
            y = normalize(x.astype(compute), *(v.astype(compute) for v in values), self.epsilon)
            return y.astype(dtype)
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
        return y.astype(dtype)


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
        dtype: type of the output; None is the input's.
        param_dtype: type of the parameters.
    """

    epsilon: float = 1e-5
    dtype: Dtype = None
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
        return y.astype(self.dtype or x.dtype)


class PlaneGate(nn.Module):
    """The spatial gate of CBAM and Triplet: `sigmoid(norm(conv(z)))` on a plane, `[..., a, b, 1]`.

    Attributes:
        kernel_size: side of the square window, odd.
        conv_bias: adds a bias to the convolution.
        conv_norm: batch normalisation of the one channel after it.
        norm_momentum: of that norm, in Flax's sense.
        norm_eps: of that norm.
        norm_scale_init: initial scale of that norm.
        dtype: type of the output; None is the input's.
        param_dtype: type of the parameters.
    """

    kernel_size: int = 7
    conv_bias: bool = False
    conv_norm: bool = True
    norm_momentum: float = 0.99
    norm_eps: float = 1e-5
    norm_scale_init: float = 0.0
    dtype: Dtype = None
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
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name='conv',
        )(z)
        if self.conv_norm:
            z = BatchNorm(
                momentum=self.norm_momentum,
                epsilon=self.norm_eps,
                scale_init=initializers.constant(self.norm_scale_init),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name='norm',
            )(z, train=train)
        return jax.nn.sigmoid(z)


_queries: contextvars.ContextVar[tuple[int, ...] | None] = contextvars.ContextVar(
    'queries', default=None
)


@contextlib.contextmanager
def map_queries(positions: Sequence[int] | None) -> Iterator[None]:
    """Within it, maps over pairs of positions hold only the rows of these query positions."""
    token = _queries.set(None if positions is None else tuple(int(p) for p in positions))
    try:
        yield
    finally:
        _queries.reset(token)


def wanted_queries(query: jax.Array) -> jax.Array:
    """The rows of query `[..., n, d]` that a map was asked for: all, or those of `map_queries`."""
    positions = _queries.get()
    if positions is None:
        return query
    n = query.shape[-2]
    if not all(0 <= p < n for p in positions):
        raise ValueError(f'queries must be positions from 0 to {n - 1}, got {positions}')
    return jnp.take(query, jnp.asarray(positions), axis=-2)


def sow_map(module: nn.Module, compute: Callable[[], jax.Array], name: str = 'map') -> None:
    """Stores an attention map in the collection `attention_maps` if it was asked for.

    Training pays nothing: `compute` is called only when the collection is mutable, and never while
    the module is being initialised (when every collection is mutable).
    """
    if module.is_mutable_collection('attention_maps') and not module.is_initializing():
        module.sow(
            'attention_maps', name, compute(), init_fn=lambda: None, reduce_fn=lambda _, new: new
        )


def flatten_positions(x: jax.Array, spatial_dims: int = 2) -> jax.Array:
    """`[..., *spatial, c] -> [..., n, c]`, the positions in row-major order."""
    return x.reshape(*x.shape[: -1 - spatial_dims], -1, x.shape[-1])


def attend_positions(
    module: nn.Module,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    chunk_size: int | None = None,
    name: str = 'map',
    **options: Any,
) -> jax.Array:
    """`functional.attend` inside a module, which sows the rows of its map that were asked for."""
    if chunk_size is not None:
        checks.at_least('chunk_size', chunk_size, 1)
    sow_map(
        module,
        lambda: functional.attention_weights(wanted_queries(query), key, **options),
        name,
    )
    return functional.attend(query, key, value, chunk_size=chunk_size, **options)


def add_gained(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """`x + gamma y` in the type of x, gamma `[1]` a parameter of `module` that starts at 0."""
    return add_scaled(x, y, module.param('gamma', initializers.zeros, (1,), module.param_dtype))


def add_scaled(x: jax.Array, y: jax.Array, gamma: jax.Array) -> jax.Array:
    """`x + gamma y` in the type of x, gamma `[1]`; the sum is rounded once."""
    wide = statistics_type(x.dtype)
    return (x.astype(wide) + gamma[0].astype(wide) * y.astype(wide)).astype(x.dtype)


def logit_scale(scale: str | float | None, channels: int, hidden: int) -> float:
    """What multiplies dot products: 'hidden' `hidden^-0.5`, 'input' `channels^-0.5`, None 1."""
    if isinstance(scale, str):
        checks.choice('scale', scale, ('hidden', 'input'))
        return (hidden if scale == 'hidden' else channels) ** -0.5
    return 1.0 if scale is None else float(scale)
