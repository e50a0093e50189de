"""Coordinate attention."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.gating import ACTIVATIONS, activation, gate, rescale
from attention_jax.modules.initializers import kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import ForeignName, TorchName, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class CoordinateAttention(nn.Module):
    """Coordinate attention: a gate for each row and one for each column, in every channel.

    With x `[..., h, w, c]` and r the hidden width::

        y = [mean_w x, mean_h x]                      [..., h + w, c]
        z = act(norm(y W1 + b1))                      [..., h + w, r]    act: hard swish
        g_h = gate(z[:h] Wh + bh)                     [..., h, c]        gate: sigmoid
        g_w = gate(z[h:] Ww + bw)                     [..., w, c]
        out[i, j] = x[i, j] * g_h[i] * g_w[j]         (+ x[i, j] with `residual`)

    Hard swish is `v * clip(v + 3, 0, 6) / 6`. Rows and columns share one batch normalisation: in
    training its statistics are over all h + w means of the batch, and b1 has no gradient. No weight
    depends on the size of the map.

    Source: Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021,
    arXiv 2103.02907; defaults from the authors' code (houqb/CoordAttention coordatt.py, and the
    same function under other names in the released mbv2_ca.py, whose argument `groups` is the
    reduction). Its argument for an output width works at the input's only. timm's `CoordAttn` has
    no biases and another rule for r; changzy00/pytorch-attention has ReLU and no gate; the
    YOLOv4-tiny of bubbliiiing/yolov4-tiny-pytorch has ReLU, no biases and c / 16 without a floor.
    Kernels start as in the authors' network, normal of variance 2 / fan out, biases 0.

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over everything else.
        min_hidden: r is at least this.
        hidden_divisor: rounds `c / reduction` to the nearest multiple (timm: 8).
        use_bias: b1, bh and bw.
        normalization: 'batch', or None.
        activation: 'hard_swish', 'relu', 'silu', 'gelu', 'tanh' or 'identity'.
        gate: 'sigmoid', 'hard_sigmoid' (`clip(v + 3, 0, 6) / 6`) or 'identity'.
        residual: adds x (timm's `has_skip`).
        dtype: type of the computation; None is the input's. Means, norm and gates are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 32
    hidden: int | None = None
    min_hidden: int = 8
    hidden_divisor: int | None = None
    use_bias: bool = True
    normalization: str | None = 'batch'
    activation: str = 'hard_swish'
    gate: str = 'sigmoid'
    residual: bool = False
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates every entry of x `[..., h, w, c]`."""
        checks.feature_map(x)
        checks.choice('normalization', self.normalization, ('batch', None))
        checks.at_least('min_hidden', self.min_hidden, 1)
        act = activation(self.activation, hard_swish=jax.nn.hard_swish)
        to_gate = gate(self.gate, identity=ACTIVATIONS['identity'])
        h, c = x.shape[-3], x.shape[-1]
        r = hidden_width(
            c,
            reduction=self.reduction,
            hidden=self.hidden,
            divisor=self.hidden_divisor,
            minimum=self.min_hidden,
        )
        x = x.astype(self.dtype or x.dtype)
        dense = functools.partial(
            Dense,
            use_bias=self.use_bias,
            kernel_init=kaiming_fan_out,
            bias_init=initializers.zeros,
            param_dtype=self.param_dtype,
        )

        mean = functools.partial(jnp.mean, dtype=statistics_type(x.dtype))
        z = dense(r, name='fc1')(jnp.concatenate([mean(x, axis=-2), mean(x, axis=-3)], -2))
        if self.normalization == 'batch':
            z = BatchNorm(param_dtype=self.param_dtype, name='norm')(z, train=train)
        z = act(z)
        g_h = to_gate(dense(c, name='fc_h')(z[..., :h, :]))
        g_w = to_gate(dense(c, name='fc_w')(z[..., h:, :]))
        # One expression, so that no array of the gate's size is written.
        g = jnp.expand_dims(g_h, -2) * jnp.expand_dims(g_w, -3)
        sow_map(self, lambda: g_h, 'h')
        sow_map(self, lambda: g_w, 'w')
        sow_map(self, lambda: g, 'gate')
        return rescale(x, 1 + g if self.residual else g)


def _names(fc1: str, norm: str, fc_h: str, fc_w: str) -> dict[ForeignName, TorchName]:
    return {**pointwise({fc1: 'fc1', fc_h: 'fc_h', fc_w: 'fc_w'}), f'{norm}.*': 'norm/*'}


register_attention(
    'coordinate',
    CoordinateAttention,
    paper='Coordinate Attention for Efficient Mobile Network Design',
    arxiv='2103.02907',
    year=2021,
    family='mixed',
    complexity='N C + (H + W) C^2/r',
    variants={
        'authors': {},
        'timm': {'reduction': 24, 'hidden_divisor': 8, 'use_bias': False},
        'changzy00': {'activation': 'relu', 'gate': 'identity'},
        'yolov4_tiny': {'reduction': 16, 'min_hidden': 1, 'use_bias': False, 'activation': 'relu'},
    },
    torch_names={
        'authors': _names('conv1', 'bn1', 'conv_h', 'conv_w'),
        'models': _names('conv1', 'bn1', 'conv2', 'conv3'),
        'yolov4_tiny': _names('conv_1x1', 'bn', 'F_h', 'F_w'),
    },
)
