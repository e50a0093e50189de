"""Efficient channel attention."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional import cost
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import gate, rescale
from attention_jax.modules.initializers import torch_bias, torch_kernel
from attention_jax.modules.layers import Conv
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import register_attention
from attention_jax.modules.widths import hidden_width


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention: each channel's gate sees the means of its k neighbours.

    With x `[..., h, w, c]`, p = (k - 1) / 2 and y = 0, or the cyclic neighbour, outside the
    channels::

        y = mean_hw x                                                  [..., c]
        v[i] = sum_j K[j] y[i + j - p] (+ b)         shared            K [k]
        v[i] = sum_j K[i, j] y[i + j - p]            per_channel       K [c, k]
        u[i] = relu(y[i] k1 + b1)                    mlp               [..., c, r]
        v[i] = sum_jq K2[j, q] u[i + j - p, q] + b2                    K2 [k, r]
        out = x * gate(v)                            gate: sigmoid

    The order of the channels matters, as it does in no other channel gate.

    Source: Wang, Wu, Zhu, Li, Zuo, Hu, "ECA-Net", CVPR 2020, arXiv 1910.03151; defaults from
    BangguWu/ECANet models/eca_module.py: k = 3 at any width. The paper derives k from the width
    (`kernel_size=None`); the released networks have one size a stage, which is neither
    (`create_model('eca_resnet50')`). `per_channel` is models/eca_ns.py. PyTorch copies in articles
    use the rule, or 3 with a bias; timm's rule gives at least 3. `mlp` is timm's own.

    Attributes:
        kernel_size: k, odd; None is the odd number nearest to `(log2(c) + beta) / gamma`, ties
            upwards, at least `min_kernel_size`.
        gamma: of that rule.
        beta: of that rule.
        min_kernel_size: lower bound of that rule, odd.
        mode: 'shared', 'per_channel' or 'mlp'.
        padding: 'zero', or 'circular': the first and the last channel are neighbours (timm); not
            in mode 'per_channel'.
        use_bias: b, in mode 'shared' only; mode 'mlp' always has its two.
        hidden: r of mode 'mlp'; None is c / 8 rounded to a multiple of 8, never more than 10 %
            below it.
        gate: 'sigmoid' or 'hard_sigmoid' (`clip(v + 3, 0, 6) / 6`).
        dtype: type of the computation; None is the input's. The pool and the gate are float32.
        param_dtype: type of the parameters.
    """

    kernel_size: int | None = 3
    gamma: float = 2.0
    beta: float = 1.0
    min_kernel_size: int = 1
    mode: str = 'shared'
    padding: str = 'zero'
    use_bias: bool = False
    hidden: int | None = None
    gate: str = 'sigmoid'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the channels of x `[..., h, w, c]`."""
        checks.feature_map(x)
        checks.choice('mode', self.mode, ('shared', 'per_channel', 'mlp'))
        checks.choice('padding', self.padding, ('zero', 'circular'))
        if self.mode == 'per_channel' and self.padding == 'circular':
            raise ValueError("padding 'circular' is not for mode 'per_channel': use 'zero'")
        if self.mode == 'per_channel' and self.use_bias:
            raise ValueError("use_bias is not for mode 'per_channel': use mode 'shared'")
        to_gate = gate(self.gate)
        c = x.shape[-1]
        k = self.kernel_size
        if k is None:
            k = _nearest_odd(c, self.gamma, self.beta, self.min_kernel_size)
        checks.odd('kernel_size', k)
        if self.padding == 'circular' and k // 2 > c:
            raise ValueError(
                f'kernel_size {k} reaches {k // 2} channels to a side, but x has {c}: use at most '
                f"{2 * c + 1} with padding 'circular'"
            )
        x = x.astype(self.dtype or x.dtype)

        y = functional.spatial_mean(x)
        pad = 'wrap' if self.padding == 'circular' else 'constant'
        types = {'param_dtype': self.param_dtype}
        if self.mode == 'shared':
            v = _SharedWindow(k, pad, self.use_bias, **types, name='conv')(y)
        elif self.mode == 'per_channel':
            init = initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=1, out_axis=0)
            v = _windows(y, self.param('kernel', init, (c, k), self.param_dtype), pad)
        else:
            r = hidden_width(c, reduction=8, hidden=self.hidden, divisor=8, guard=True)
            u = jax.nn.relu(Conv(r, (1,), **types, name='conv1')(y[..., None]))
            v = Conv(1, (k,), padding=0, **types, name='conv2')(_pad(u, -2, k // 2, pad))[..., 0]
        g = to_gate(v)
        sow_map(self, lambda: g)
        return rescale(x, g)


def _nearest_odd(channels: int, gamma: float, beta: float, minimum: int) -> int:
    """The paper's kernel size: the odd number nearest to `(log2(channels) + beta) / gamma`."""
    if not gamma > 0:
        raise ValueError(f'gamma must be positive, got {gamma}')
    checks.odd('min_kernel_size', minimum)
    size = int(abs((math.log2(channels) + beta) / gamma))
    return max(size if size % 2 else size + 1, minimum)


class _SharedWindow(nn.Module):
    """One kernel of k taps along the channels of `[..., c]`."""

    kernel_size: int
    pad: str
    use_bias: bool
    param_dtype: Dtype

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        k = self.kernel_size
        kernel = self.param('kernel', torch_kernel, (k, 1, 1), self.param_dtype)
        v = _windows(y, kernel.reshape(1, k), self.pad)
        if self.use_bias:
            bias = self.param('bias', torch_bias(k), (1,), self.param_dtype)
            v = v + expand_to(bias.astype(v.dtype), v)
        return v


def _windows(y: jax.Array, kernel: jax.Array, pad: str) -> jax.Array:
    """`v[i] = sum_j kernel[i, j] y[i + j - k // 2]`, kernel `[c, k]` or one for all, `[1, k]`.

    As a sum of shifted vectors: a convolution with one channel leaves vector and matrix units idle
    on every device, and so few numbers are worth no matrix.
    """
    c, k = y.shape[-1], kernel.shape[-1]
    cost.add('macs', y.size * k)
    padded = _pad(y, -1, k // 2, pad)
    taps = kernel.astype(y.dtype).T.reshape(k, *(1,) * (y.ndim - 1), -1)
    return sum(taps[j] * lax.slice_in_dim(padded, j, j + c, axis=-1) for j in range(k))


def _pad(y: jax.Array, axis: int, width: int, mode: str) -> jax.Array:
    """`width` zeros, or cyclic neighbours, on both sides of an axis."""
    margins = [(0, 0)] * y.ndim
    margins[axis] = (width, width)
    return jnp.pad(y, margins, mode=mode)


register_attention(
    'eca',
    EfficientChannelAttention,
    paper='ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks',
    arxiv='1910.03151',
    year=2020,
    family='channel',
    complexity='N C + k C',
    variants={
        'authors': {},
        'paper': {'kernel_size': None},
        'per_channel': {'mode': 'per_channel'},
        'article': {'use_bias': True},
        'timm': {'kernel_size': None, 'min_kernel_size': 3},
        'timm_circular': {'kernel_size': None, 'min_kernel_size': 3, 'padding': 'circular'},
        'timm_mlp': {'kernel_size': None, 'min_kernel_size': 3, 'mode': 'mlp'},
    },
    torch_names={
        'authors': {'conv.*': 'conv/*', 'conv.weight': ('kernel', 'c 1 k -> c k')},
        'timm_mlp': {'conv.*': 'conv1/*', 'conv2.*': 'conv2/*'},
    },
)
