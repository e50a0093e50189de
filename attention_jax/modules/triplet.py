"""Triplet attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import PlaneGate, rescale
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import Scheme, register_attention


class TripletAttention(nn.Module):
    """Triplet attention: a gate on each of the three planes of a map, averaged.

    With x `[..., h, w, c]`, k the window and `gate(z) = sigmoid(norm(conv_kxk(z)))`, zero padding,
    each gate with weights of its own::

        g_cw = gate([max_h x, mean_h x])            [..., c, w]
        g_hc = gate([max_w x, mean_w x])            [..., h, c]
        g_hw = gate([max_c x, mean_c x])            [..., h, w]    the gate of `cbam_spatial`
        out = x * (g_cw + g_hc + g_hw) / 3
        out = x * (g_cw + g_hc) / 2                                without `spatial`

    The kernel of cw runs over (c, w), that of hc over (h, c): the gates depend on the order of the
    channels, and no weight on the size of the map. Equal maxima share the gradient (PyTorch's `max`
    gives it to the first).

    Source: Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention
    Module", WACV 2021, arXiv 2010.03045; defaults from the authors' code (LandskapeAI/
    triplet-attention, triplet_attention.py and the same function in MODELS/triplet_attention.py),
    which gates three copies of x and averages them. An earlier version, and half of the README's
    table, has windows of 3. The kernels start normal of variance 2 / k^2. The norms' scales start
    at 1, but at 0 in hw, as the rules of the authors' ResNets have it; in their MobileNetV2 all
    start at 1 (`norm_scale_init=1.0`).

    Attributes:
        kernel_size: k, odd; it may be larger than the map.
        spatial: False leaves g_hw out (the authors' `no_spatial`).
        norm_momentum: of the norms, in Flax's sense (1 - PyTorch's).
        norm_eps: of the norms.
        norm_scale_init: initial scale of the norm of hw.
        dtype: type of the computation; None is the input's. The gates are float32 inside.
        param_dtype: type of the parameters.
    """

    kernel_size: int = 7
    spatial: bool = True
    norm_momentum: float = 0.99
    norm_eps: float = 1e-5
    norm_scale_init: float = 0.0
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates every entry of x `[..., h, w, c]`; `train` is for the norms."""
        checks.feature_map(x)
        x = x.astype(self.dtype or x.dtype)
        pooled = {'cw': -3, 'hc': -2} | ({'hw': -1} if self.spatial else {})
        gates = [
            _Plane(
                axis=axis,
                kernel_size=self.kernel_size,
                norm_momentum=self.norm_momentum,
                norm_eps=self.norm_eps,
                norm_scale_init=self.norm_scale_init if name == 'hw' else 1.0,
                param_dtype=self.param_dtype,
                name=name,
            )(x, train=train)
            for name, axis in pooled.items()
        ]
        return rescale(x, sum(gates) / len(gates))


class _Plane(PlaneGate):
    """The gate on the plane that is left when `axis` of x `[..., h, w, c]` is pooled.

    It has as many axes as x, ready to be multiplied, and is float32 or float64.
    """

    axis: int = -1

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        mean, top = functional.axis_mean_and_max(x, self.axis)
        z = jnp.stack([top, mean], -1)
        turn = self.axis == -3  # what is left is [..., w, c], but the kernel runs over (c, w)
        if turn:
            z = rearrange(z, '... w c q -> ... c w q')
        g = super().__call__(z, train=train)[..., 0]
        sow_map(self, lambda: g)
        return jnp.expand_dims(rearrange(g, '... c w -> ... w c') if turn else g, self.axis)


def _names(gate: str, **planes: str) -> Scheme:
    """Names of the convolution and norm of each plane's gate, `gate` being where they sit."""
    return {
        f'{theirs}.{gate}.{layer}.*': f'{ours}/{name}/*'
        for ours, theirs in planes.items()
        for layer, name in (('conv', 'conv'), ('bn', 'norm'))
    }


register_attention(
    'triplet',
    TripletAttention,
    paper='Rotate to Attend: Convolutional Triplet Attention Module',
    arxiv='2010.03045',
    year=2021,
    family='mixed',
    complexity='N C + k^2 (N + (H + W) C)',
    variants={
        'authors': {},
        'authors_no_spatial': {'spatial': False},
        'authors_kernel3': {'kernel_size': 3},
        'mobilenet_v2': {'norm_scale_init': 1.0},
    },
    torch_names={
        'authors': _names('conv', cw='cw', hc='hc', hw='hw'),
        'models': _names('spatial', cw='ChannelGateH', hc='ChannelGateW', hw='SpatialGate'),
    },
)
