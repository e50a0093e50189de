"""CBAM: a gate per channel, then a gate per position; and its two halves alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.gating import PlaneGate, rescale
from attention_jax.modules.layers import Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import (
    ForeignName,
    TorchName,
    pointwise,
    register_attention,
    shared_fields,
)
from attention_jax.modules.widths import hidden_width


class CBAM(nn.Module):
    """Convolutional block attention module: a gate per channel, then a gate per position.

    With x `[..., h, w, c]`::

        y = channel(x)                              `CBAMChannel`, [..., h, w, c]
        out = spatial(y) (+ x)                      `CBAMSpatial`, + x only if `residual`

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv
    1807.06521, eq. 1; defaults from the authors' code (Jongchan/attention-module MODELS/cbam.py).
    The halves tell where paper, timm and articles differ; one collection adds x and takes a window
    of 49 ('xmu' among the variants). For another order, call the halves yourself.

    Attributes:
        reduction: divisor of the channels that gives the MLP's hidden width, rounded down.
        hidden: that width itself; wins over `reduction`.
        pool_types: pools of the channel half, different names among 'avg', 'max', 'lp' and 'lse'.
        mlp_bias: biases of the MLP.
        spatial: False leaves the spatial half out (the authors' `no_spatial`).
        kernel_size: side of the spatial window, odd.
        pool_order: 'max_mean' or 'mean_max', the channels that the spatial convolution reads.
        conv_bias: adds a bias to the spatial convolution.
        conv_norm: batch normalisation after it.
        norm_momentum: of that norm, in Flax's sense (1 - PyTorch's).
        norm_eps: of that norm.
        norm_scale_init: its initial scale.
        mode: 'full', or timm's 'light' in both halves.
        residual: adds x to the result.
        dtype: type of the computation; None is the input's. The gates are float32 inside.
        param_dtype: type of the parameters.
    """

    reduction: int = 16
    hidden: int | None = None
    pool_types: tuple[str, ...] = ('avg', 'max')
    mlp_bias: bool = True
    spatial: bool = True
    kernel_size: int = 7
    pool_order: str = 'max_mean'
    conv_bias: bool = False
    conv_norm: bool = True
    norm_momentum: float = 0.99
    norm_eps: float = 1e-5
    norm_scale_init: float = 0.0
    mode: str = 'full'
    residual: bool = False
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the channels, then the positions of x `[..., h, w, c]`."""
        checks.feature_map(x)
        x = x.astype(self.dtype or x.dtype)
        y = CBAMChannel(**shared_fields(self, CBAMChannel), name='channel')(x)
        if self.spatial:
            y = CBAMSpatial(**shared_fields(self, CBAMSpatial), name='spatial')(y, train=train)
        return y + x if self.residual else y


class CBAMChannel(nn.Module):
    """The channel half of CBAM: one gate per channel from several pools through one MLP.

    With x `[..., h, w, c]`, r the hidden width and T the pools::

        p_t = pool_t x                              [..., c]    t in T: mean and max over h, w
        m(p) = relu(p W1 + b1) W2 + b2              [..., c]
        g = sigmoid(sum_t m(p_t))                   [..., c]    b2 enters once a pool
        g = sigmoid(m(mean_t p_t))                              mode 'light' (timm)
        out = x * g

    Further pools of the authors' code: 'lp', `sqrt(sum x^2)`, and 'lse', `log sum exp x`; both are
    sums over positions and grow with the map, so their weights fit one resolution. Where a channel
    is zero the gradient of 'lp' is zero. Equal maxima share the gradient (PyTorch's `max` gives it
    to the first).

    Source: that of `CBAM`, eq. 2, and `ChannelGate` of its code: reduction 16 rounded down, biases,
    which start at zero as the authors' ResNet starts them (kernels: PyTorch's default). The paper's
    formula, timm and articles leave the biases out; timm rounds the hidden width to the nearest
    integer (give `hidden`).

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        pool_types: T, different names among 'avg', 'max', 'lp' and 'lse'.
        mlp_bias: b1 and b2.
        mode: 'full', or 'light': one pass of the MLP on the mean of the pools.
        dtype: type of the computation; None is the input's. Pools, MLP and gate are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 16
    hidden: int | None = None
    pool_types: tuple[str, ...] = ('avg', 'max')
    mlp_bias: bool = True
    mode: str = 'full'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the channels of x `[..., h, w, c]`."""
        checks.feature_map(x)
        checks.choice('mode', self.mode, ('full', 'light'))
        c = x.shape[-1]
        r = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        x = x.astype(self.dtype or x.dtype)

        pools = _pool(x, self.pool_types)
        if self.mode == 'light':
            pools = [sum(pools) / len(pools)]
        settings = {'bias_init': initializers.zeros, 'param_dtype': self.param_dtype}
        layer = functools.partial(Dense, use_bias=self.mlp_bias, **settings)
        fc1, fc2 = layer(r, name='fc1'), layer(c, name='fc2')
        g = jax.nn.sigmoid(sum(fc2(jax.nn.relu(fc1(p))) for p in pools))
        sow_map(self, lambda: g)
        return rescale(x, g)


class CBAMSpatial(PlaneGate):
    """The spatial half of CBAM: one gate per position from the mean and maximum over channels.

    With x `[..., h, w, c]` and k the window::

        z = [max_c x, mean_c x]                     [..., h, w, 2]
        z = 0.5 max_c x + 0.5 mean_c x              [..., h, w, 1]    mode 'light' (timm)
        g = sigmoid(norm(conv_kxk(z)))              [..., h, w, 1]    zero padding, stride 1
        out = x * g

    Source: that of `CBAM`, eq. 3, and `SpatialGate` of its code with the rules of its
    MODELS/model_resnet.py: no bias, a batch norm of momentum 0.99 whose scale starts at 0, so every
    gate starts as 0.5 and the first step moves the scale alone (`norm_scale_init=1.0` for the
    module outside their ResNet). The paper's formula has no norm and the mean first; so have
    articles, some with a bias; timm has the mean first and momentum 0.9. Weights of the other order
    swap the two inputs of the kernel: `pool_order` must be theirs. Equal maxima share the gradient
    (PyTorch's `max` gives it to the first).

    Attributes:
        kernel_size: k, odd.
        pool_order: 'max_mean' or 'mean_max', the channels of z.
        conv_bias: adds a bias to the convolution.
        conv_norm: batch normalisation after it.
        norm_momentum: of that norm, in Flax's sense (1 - PyTorch's).
        norm_eps: of that norm.
        norm_scale_init: its initial scale.
        mode: 'full', or 'light': half the sum of the two pools.
        dtype: type of the computation; None is the input's. The gate is float32 inside.
        param_dtype: type of the parameters.
    """

    pool_order: str = 'max_mean'
    mode: str = 'full'
    dtype: Dtype = None

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the positions of x `[..., h, w, c]`; a single one is refused in training."""
        checks.feature_map(x)
        checks.choice('pool_order', self.pool_order, ('max_mean', 'mean_max'))
        checks.choice('mode', self.mode, ('full', 'light'))
        x = x.astype(self.dtype or x.dtype)

        mean, top = functional.channel_mean_and_max(x)
        if self.mode == 'light':
            z = 0.5 * (top + mean)[..., None]
        else:
            z = jnp.stack([top, mean] if self.pool_order == 'max_mean' else [mean, top], -1)
        g = super().__call__(z, train=train)
        sow_map(self, lambda: g[..., 0])
        return rescale(x, g)


def _pool(x: jax.Array, types: tuple[str, ...]) -> list[jax.Array]:
    """The pools of x over positions, `[..., c]` each, float32 or float64."""
    known = ('avg', 'max', 'lp', 'lse')
    if not types or len(set(types)) < len(types) or not set(types) <= set(known):
        raise ValueError(f'pool_types must be different names among {known}, got {types!r}')
    pools = {}
    if 'max' in types or 'lse' in types:
        pools['avg'], pools['max'] = functional.spatial_mean_and_max(x)
    elif 'avg' in types:
        pools['avg'] = functional.spatial_mean(x)
    wide = x.astype(statistics_type(x.dtype))
    if 'lp' in types:
        squares = jnp.square(wide).sum((-3, -2))
        some = squares > 0  # the square root has no derivative at 0
        pools['lp'] = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
    if 'lse' in types:
        # Any shift cancels, so that the maximum needs no gradient.
        shift = jax.lax.stop_gradient(pools['max'])
        total = jnp.exp(wide - jnp.expand_dims(shift, (-3, -2))).sum((-3, -2))
        pools['lse'] = shift + jnp.log(total)
    return [pools[t] for t in types]


_PAPER = {
    'paper': 'CBAM: Convolutional Block Attention Module',
    'arxiv': '1807.06521',
    'year': 2018,
}

# Names of the halves alone; 'article' is the form of lecture notes and answers (two submodules in
# one block), 'article_parts' that of modules which return their gates, 'xmu' that of
# xmu-xiaoma666/External-Attention-pytorch.
_CHANNEL_NAMES: dict[str, dict[ForeignName, TorchName]] = {
    'authors': {'mlp.1.*': 'fc1/*', 'mlp.3.*': 'fc2/*'},
    'timm': pointwise({'fc1': 'fc1', 'fc2': 'fc2'}),
    'article': pointwise({'fc.0': 'fc1', 'fc.2': 'fc2'}),
    'article_parts': {'shared_MLP.0.*': 'fc1/*', 'shared_MLP.2.*': 'fc2/*'},
    'xmu': pointwise({'se.0': 'fc1', 'se.2': 'fc2'}),
}
_SPATIAL_NAMES: dict[str, dict[ForeignName, TorchName]] = {
    'authors': {'spatial.conv.*': 'conv/*', 'spatial.bn.*': 'norm/*'},
    'timm': {'conv.conv.*': 'conv/*', 'conv.bn.*': 'norm/*'},
    'article': {'conv.*': 'conv/*'},  # xmu's too
    'article_parts': {'conv2d.*': 'conv/*'},
}


def _both(scheme: str, channel: str, spatial: str) -> dict[ForeignName, TorchName]:
    """The names of a whole CBAM: those of its halves behind the halves' own."""
    return {
        f'{channel}.**': ('channel/**', _CHANNEL_NAMES[scheme]),
        f'{spatial}.**': ('spatial/**', _SPATIAL_NAMES.get(scheme, _SPATIAL_NAMES['article'])),
    }


_CHANNEL_VARIANTS: dict[str, dict[str, Any]] = {
    'authors': {},
    'authors_all_pools': {'pool_types': ('avg', 'max', 'lp', 'lse')},
    'timm': {'mlp_bias': False},
    'timm_light': {'mlp_bias': False, 'mode': 'light'},
    'article': {'reduction': 8, 'mlp_bias': False},
}
_SPATIAL_VARIANTS: dict[str, dict[str, Any]] = {
    'authors': {},
    'timm': {'pool_order': 'mean_max', 'norm_momentum': 0.9, 'norm_scale_init': 1.0},
    'timm_light': {'mode': 'light', 'norm_momentum': 0.9, 'norm_scale_init': 1.0},
    'article': {'pool_order': 'mean_max', 'conv_norm': False},
    'article_parts': {'pool_order': 'mean_max', 'conv_norm': False, 'conv_bias': True},
}

register_attention(
    'cbam_channel',
    CBAMChannel,
    **_PAPER,
    family='channel',
    complexity='N C + C^2/r',
    variants=_CHANNEL_VARIANTS,
    torch_names=_CHANNEL_NAMES,
)
register_attention(
    'cbam_spatial',
    CBAMSpatial,
    **_PAPER,
    family='spatial',
    complexity='N (C + k^2)',
    variants=_SPATIAL_VARIANTS,
    torch_names=_SPATIAL_NAMES,
)
register_attention(
    'cbam',
    CBAM,
    **_PAPER,
    family='mixed',
    complexity='N (C + k^2) + C^2/r',
    variants={
        'authors': {},
        'authors_all_pools': _CHANNEL_VARIANTS['authors_all_pools'],
        'authors_no_spatial': {'spatial': False},
        'paper': {'mlp_bias': False, 'pool_order': 'mean_max', 'conv_norm': False},
        'timm': _CHANNEL_VARIANTS['timm'] | _SPATIAL_VARIANTS['timm'],
        'timm_light': _CHANNEL_VARIANTS['timm_light'] | _SPATIAL_VARIANTS['timm_light'],
        'article': _CHANNEL_VARIANTS['article'] | _SPATIAL_VARIANTS['article'],
        'article_parts': _SPATIAL_VARIANTS['article_parts'],
        'xmu': {
            'mlp_bias': False,
            'kernel_size': 49,
            'conv_norm': False,
            'conv_bias': True,
            'residual': True,
        },
    },
    torch_names={
        'authors': _both('authors', 'ChannelGate', 'SpatialGate'),
        'timm': _both('timm', 'channel', 'spatial'),
        'article': _both('article', 'channelattention', 'spatialattention'),
        'article_parts': {
            'shared_MLP.0.*': 'channel/fc1/*',
            'shared_MLP.2.*': 'channel/fc2/*',
            'conv2d.*': 'spatial/conv/*',
        },
        'xmu': _both('xmu', 'ca', 'sa'),
    },
)
