"""Squeeze-and-excitation."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax import checks
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import activation, gate, rescale, squeeze
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: one gate per channel from the mean over positions.

    With x `[..., h, w, c]` and r the hidden width::

        y = mean_hw x                        [..., c]
        z = act(norm(y W1 + b1))             [..., r]    norm: none by default, act: ReLU
        g = gate(z W2 + b2)                  [..., c]    gate: sigmoid
        out = x * g

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507, eq. 2-4;
    defaults from the authors' Caffe graphs (hujie-frank/SENet): reduction 16 rounded down, biases.
    Many PyTorch copies leave the biases out (`use_bias=False`); timm rounds the hidden width to a
    multiple of 8 (`hidden_divisor=8`). The released graphs hold no initialiser: kernels and biases
    start as PyTorch's layers do.

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        hidden_divisor: rounds `c / reduction` to the nearest multiple, at least one (timm: 8).
        use_bias: b1 and b2.
        activation: 'relu', 'silu', 'gelu', 'tanh' or 'identity', between the layers.
        gate: 'sigmoid' or 'hard_sigmoid' (`clip(v + 3, 0, 6) / 6`).
        squeeze: 'average', or 'average_max', half the mean plus half the maximum (timm). Ties of
            the maximum share its gradient evenly.
        normalization: None, or 'batch': batch normalisation before the activation (timm).
        dtype: type of the computation; None is the input's. The pool and the gate are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 16
    hidden: int | None = None
    hidden_divisor: int | None = None
    use_bias: bool = True
    activation: str = 'relu'
    gate: str = 'sigmoid'
    squeeze: str = 'average'
    normalization: str | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the channels of x `[..., h, w, c]`; `train` is for the norm."""
        checks.feature_map(x)
        checks.choice('normalization', self.normalization, (None, 'batch'))
        act, to_gate = activation(self.activation), gate(self.gate)
        c = x.shape[-1]
        r = hidden_width(
            c, reduction=self.reduction, hidden=self.hidden, divisor=self.hidden_divisor
        )
        x = x.astype(self.dtype or x.dtype)

        y = squeeze(self.squeeze, x)
        z = Dense(r, use_bias=self.use_bias, param_dtype=self.param_dtype, name='fc1')(y)
        if self.normalization == 'batch':
            z = BatchNorm(param_dtype=self.param_dtype, name='norm')(z, train=train)
        z = Dense(c, use_bias=self.use_bias, param_dtype=self.param_dtype, name='fc2')(act(z))
        g = to_gate(z)
        sow_map(self, lambda: g)
        return rescale(x, g)


register_attention(
    'se',
    SqueezeExcite,
    paper='Squeeze-and-Excitation Networks',
    arxiv='1709.01507',
    year=2018,
    family='channel',
    complexity='N C + C^2/r',
    variants={
        'authors': {},
        'article': {'use_bias': False},
        'timm': {'hidden_divisor': 8},
        'timm_add_maxpool': {'hidden_divisor': 8, 'squeeze': 'average_max'},
        'timm_norm': {'hidden_divisor': 8, 'normalization': 'batch', 'use_bias': False},
        'efficientnet': {'reduction': 4, 'activation': 'silu'},
        'mobilenet_v3': {'reduction': 4, 'gate': 'hard_sigmoid'},
    },
    torch_names={
        'torchvision': {**pointwise({'fc1': 'fc1', 'fc2': 'fc2'}), 'bn.*': 'norm/*'},
        'efficientnet': pointwise({'conv_reduce': 'fc1', 'conv_expand': 'fc2'}),
        'article': {'fc.0.*': 'fc1/*', 'fc.2.*': 'fc2/*'},
    },
)
