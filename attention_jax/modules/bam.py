"""Bottleneck attention module."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.gating import rescale
from attention_jax.modules.initializers import kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import TorchNames, register_attention
from attention_jax.modules.widths import hidden_width


class BAM(nn.Module):
    """Bottleneck attention module: a branch per channel and a branch per position make one gate.

    With x `[..., h, w, c]` and r the hidden width::

        v = mean_hw x                                       [..., c]
        v = relu(norm(v W + b))                             [..., r]          channel_layers times
        a_c = v Wo + bo                                     [..., c]
        u = relu(norm(x Wr + br))                           [..., h, w, r]
        u = relu(norm(conv_kxk(u; dilation) + b))           [..., h, w, r]    dilated_layers times
        a_s = u Ws + bs                                     [..., h, w, 1]
        g = sigmoid(a_c * a_s)                              [..., h, w, c]    combine: multiply
        g = sigmoid(a_c + a_s)                                                combine: add
        out = x * (1 + g)                                   x * g without `residual`

    norm is batch normalisation; in training a bias in front of one has no gradient. With
    `norm_position='output'` the norms of W and Wr (and the ReLU of Wr) are left out, and a_c and
    a_s are normalised instead.

    Source: Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, arXiv 1807.06514;
    defaults from the authors' code (Jongchan/attention-module MODELS/bam.py). It multiplies the
    branches where the paper's eq. 2 adds them: where one is negative the other's meaning turns
    round. The paper's eq. 3-4 read as norms of the outputs ('paper_norm_output' among the variants;
    changzy00/pytorch-attention has that form). The released pool is a square window of side h: on
    square maps it is this mean, others it cannot take. One collection pads a dilated convolution by
    1 whatever the dilation, so that the map shrinks; here it never does. Kernels start as in the
    authors' ResNet: dense ones PyTorch's default, convolutions normal of variance 2 / fan out, all
    biases 0. Another module called BAM, of a change detector, is `downsampled_self_attention`.

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        channel_layers: hidden layers of the channel branch, at least 1.
        dilated_layers: dilated convolutions of the spatial branch.
        dilation: distance of their taps.
        kernel_size: k, odd.
        combine: 'multiply' or 'add'.
        norm_position: 'hidden' or 'output'.
        residual: the 1 in 1 + g.
        norm_momentum: of the norms, in Flax's sense (1 - PyTorch's).
        norm_eps: of the norms.
        dtype: type of the computation; None is the input's. Channel branch and gate are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 16
    hidden: int | None = None
    channel_layers: int = 1
    dilated_layers: int = 2
    dilation: int = 4
    kernel_size: int = 3
    combine: str = 'multiply'
    norm_position: str = 'hidden'
    residual: bool = True
    norm_momentum: float = 0.9
    norm_eps: float = 1e-5
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates every entry of x `[..., h, w, c]`; a batch of one is refused in training."""
        checks.feature_map(x)
        checks.choice('combine', self.combine, ('multiply', 'add'))
        checks.choice('norm_position', self.norm_position, ('hidden', 'output'))
        checks.at_least('channel_layers', self.channel_layers, 1)
        checks.at_least('dilated_layers', self.dilated_layers, 0)
        checks.at_least('dilation', self.dilation, 1)
        checks.odd('kernel_size', self.kernel_size)
        r = hidden_width(x.shape[-1], reduction=self.reduction, hidden=self.hidden)
        x = x.astype(self.dtype or x.dtype)

        types = {'param_dtype': self.param_dtype}
        norm = functools.partial(
            BatchNorm, momentum=self.norm_momentum, epsilon=self.norm_eps, **types
        )
        common = {'norm': norm, 'norm_output': self.norm_position == 'output', **types}
        channel = _ChannelBranch(r, self.channel_layers, **common, name='channel')(x, train)
        spatial = _SpatialBranch(
            r, self.dilated_layers, self.dilation, self.kernel_size, **common, name='spatial'
        )(x, train)
        channel = jnp.expand_dims(channel, (-3, -2))
        spatial = spatial.astype(statistics_type(x.dtype))
        # One expression, so that no array of the gate's size is written.
        g = jax.nn.sigmoid(channel * spatial if self.combine == 'multiply' else channel + spatial)
        sow_map(self, lambda: g, 'gate')
        return rescale(x, 1 + g if self.residual else g)


class _ChannelBranch(nn.Module):
    """a_c `[..., c]` of x `[..., h, w, c]`, in float32 or float64."""

    hidden: int
    layers: int
    norm: functools.partial
    norm_output: bool
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(Dense, bias_init=initializers.zeros, param_dtype=self.param_dtype)
        v = functional.spatial_mean(x)
        for i in range(self.layers):
            v = dense(self.hidden, name=f'fc{i}')(v)
            if not self.norm_output:
                v = self.norm(name=f'norm{i}')(v, train=train)
            v = jax.nn.relu(v)
        v = dense(x.shape[-1], name='out')(v)
        if self.norm_output:
            v = self.norm(name='out_norm')(v, train=train)
        sow_map(self, lambda: v)
        return v


class _SpatialBranch(nn.Module):
    """a_s `[..., h, w, 1]` of x `[..., h, w, c]`."""

    hidden: int
    layers: int
    dilation: int
    kernel_size: int
    norm: functools.partial
    norm_output: bool
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        inits = {'kernel_init': kaiming_fan_out, 'bias_init': initializers.zeros}
        conv = functools.partial(Conv, **inits, param_dtype=self.param_dtype)
        window = (self.kernel_size, self.kernel_size)
        u = conv(self.hidden, (1, 1), name='reduce')(x)
        if not self.norm_output:
            u = jax.nn.relu(self.norm(name='reduce_norm')(u, train=train))
        for i in range(self.layers):
            u = conv(self.hidden, window, dilation=self.dilation, name=f'conv{i}')(u)
            u = jax.nn.relu(self.norm(name=f'norm{i}')(u, train=train))
        u = conv(1, (1, 1), name='out')(u)
        if self.norm_output:
            u = self.norm(name='out_norm')(u, train=train)
        sow_map(self, lambda: u[..., 0])
        return u


def _torch_names(module: BAM) -> TorchNames:
    """Names in the released code and in two collections.

    The authors number a dense layer from 0 and its norm from 1; changzy00/pytorch-attention numbers
    the places in a sequence. 'xmu' is xmu-xiaoma666/External-Attention-pytorch.
    """
    layers, dilated = range(module.channel_layers), range(module.dilated_layers)
    return {
        'authors': {
            'channel_att.gate_c.gate_c_fc_{i}.*': 'channel/fc{i}/*',
            **{f'channel_att.gate_c.gate_c_bn_{i + 1}.*': f'channel/norm{i}/*' for i in layers},
            'channel_att.gate_c.gate_c_fc_final.*': 'channel/out/*',
            'spatial_att.gate_s.gate_s_conv_reduce0.*': 'spatial/reduce/*',
            'spatial_att.gate_s.gate_s_bn_reduce0.*': 'spatial/reduce_norm/*',
            'spatial_att.gate_s.gate_s_conv_di_{i}.*': 'spatial/conv{i}/*',
            'spatial_att.gate_s.gate_s_bn_di_{i}.*': 'spatial/norm{i}/*',
            'spatial_att.gate_s.gate_s_conv_final.*': 'spatial/out/*',
        },
        'xmu': {
            'ca.ca.fc{i}.*': 'channel/fc{i}/*',
            'ca.ca.bn{i}.*': 'channel/norm{i}/*',
            'ca.ca.last_fc.*': 'channel/out/*',
            'sa.sa.conv_reduce1.*': 'spatial/reduce/*',
            'sa.sa.bn_reduce1.*': 'spatial/reduce_norm/*',
            'sa.sa.conv_{i}.*': 'spatial/conv{i}/*',
            'sa.sa.bn_{i}.*': 'spatial/norm{i}/*',
            'sa.sa.last_conv.*': 'spatial/out/*',
        },
        'changzy00': {
            **{f'channel_attn.mlp.{2 * i}.*': f'channel/fc{i}/*' for i in layers},
            f'channel_attn.mlp.{2 * len(layers)}.*': 'channel/out/*',
            'channel_attn.bn.*': 'channel/out_norm/*',
            'spatial_attn.conv1.*': 'spatial/reduce/*',
            **{f'spatial_attn.conv2.{3 * i}.*': f'spatial/conv{i}/*' for i in dilated},
            **{f'spatial_attn.conv2.{3 * i + 1}.*': f'spatial/norm{i}/*' for i in dilated},
            'spatial_attn.conv3.*': 'spatial/out/*',
            'spatial_attn.bn.*': 'spatial/out_norm/*',
        },
    }


register_attention(
    'bam',
    BAM,
    paper='BAM: Bottleneck Attention Module',
    arxiv='1807.06514',
    year=2018,
    family='mixed',
    complexity='N C^2 (1/r + k^2/r^2)',
    placement='stage',
    variants={
        'authors': {},
        'paper': {'combine': 'add'},
        'paper_norm_output': {'combine': 'add', 'norm_position': 'output'},
        'xmu': {'channel_layers': 3, 'dilated_layers': 3, 'dilation': 2, 'combine': 'add'},
    },
    torch_names=_torch_names,
)
