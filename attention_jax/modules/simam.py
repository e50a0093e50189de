"""SimAM."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax import checks
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.gating import rescale
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import register_attention


class SimAM(nn.Module):
    """SimAM: one gate per position and channel, from how far the value is from its channel's mean.

    With the N positions of x `[..., h, w, c]`::

        d = (x - mean_hw x)^2                       [..., h, w, c]
        v = sum_hw d / (N - 1)                      [..., c]
        g = sigmoid(d / (4 (v + e_lambda)) + 1/2)   [..., h, w, c]
        out = x * g

    There are no parameters; every channel is on its own. No gate is below sigmoid(1/2) = 0.622, and
    a constant channel has that everywhere.

    Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for
    Convolutional Neural Networks", ICML 2021; defaults from the authors' code (ZjjConan/SimAM
    networks/attentions/simam_module.py, `simam_module`), whose ImageNet commands pass 0.1
    (variant 'imagenet'). On a single position it gives NaN. Their ResNets have it between the
    second convolution and its norm.

    Attributes:
        e_lambda: added to the variance.
        dtype: type of the computation; None is the input's. Statistics and gate are float32.
        param_dtype: type of the parameters, of which there are none.
    """

    e_lambda: float = 1e-4
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates x `[..., h, w, c]`; a single position has no variance and is refused."""
        checks.feature_map(x)
        positions = x.shape[-3] * x.shape[-2]
        if positions < 2:
            raise ValueError(f'x must have more than one position, got shape {x.shape}')
        x = x.astype(self.dtype or x.dtype)
        wide = x.astype(statistics_type(x.dtype))
        # Two passes: the mean first, or float32 has no digits left for a map far from 0.
        d = jnp.square(wide - wide.mean((-3, -2), keepdims=True))
        v = d.sum((-3, -2), keepdims=True) / (positions - 1)
        g = jax.nn.sigmoid(d / (4 * (v + self.e_lambda)) + 0.5)
        sow_map(self, lambda: g)
        return rescale(x, g)


register_attention(
    'simam',
    SimAM,
    paper='SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks',
    year=2021,
    family='mixed',
    complexity='N C',
    placement='conv2_pre_norm',
    variants={'authors': {}, 'imagenet': {'e_lambda': 0.1}},
    torch_names={'authors': {}},
)
