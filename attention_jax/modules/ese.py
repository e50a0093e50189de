"""Effective squeeze-and-excitation."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import gate, rescale, squeeze
from attention_jax.modules.layers import Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import pointwise, register_attention


class EffectiveSqueezeExcite(nn.Module):
    """Effective squeeze-and-excitation (eSE): one full layer from the means to the gates.

    With x `[..., h, w, c]`::

        y = mean_hw x                        [..., c]
        g = gate(y W + b)                    [..., c]    W [c, c], gate: clip(v + 3, 0, 6) / 6
        out = x * g

    Nothing is reduced, so nothing is lost, at c^2 parameters. Where a gate saturates (|v| >= 3) its
    gradient is exactly zero, and stays so.

    Source: Lee, Park, "CenterMask", CVPR 2020, arXiv 1911.06667 (VoVNetV2); defaults from
    youngwanLEE/vovnet-detectron2 vovnet/vovnet.py `eSEModule`, whose argument `reduction` does
    nothing. W starts as in that network, normal of variance 2 / c, b as PyTorch's do. timm's
    `EffectiveSEModule` is the same, with an option to add the maximum.

    Attributes:
        gate: 'hard_sigmoid' or 'sigmoid'.
        squeeze: 'average', or 'average_max', half the mean plus half the maximum (timm). Ties of
            the maximum share its gradient evenly.
        use_bias: b.
        dtype: type of the computation; None is the input's. The pool and the gate are float32.
        param_dtype: type of the parameters.
    """

    gate: str = 'hard_sigmoid'
    squeeze: str = 'average'
    use_bias: bool = True
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates the channels of x `[..., h, w, c]`."""
        checks.feature_map(x)
        to_gate = gate(self.gate)
        x = x.astype(self.dtype or x.dtype)

        v = Dense(
            x.shape[-1],
            use_bias=self.use_bias,
            kernel_init=initializers.variance_scaling(2.0, 'fan_in', 'normal'),
            param_dtype=self.param_dtype,
            name='fc',
        )(squeeze(self.squeeze, x))
        g = to_gate(v)
        sow_map(self, lambda: g)
        return rescale(x, g)


register_attention(
    'ese',
    EffectiveSqueezeExcite,
    paper='CenterMask: Real-Time Anchor-Free Instance Segmentation',
    arxiv='1911.06667',
    year=2020,
    family='channel',
    complexity='N C + C^2',
    variants={
        'authors': {},
        'timm_add_maxpool': {'squeeze': 'average_max'},
        'sigmoid': {'gate': 'sigmoid'},
    },
    torch_names={'authors': pointwise({'fc': 'fc'})},
)
