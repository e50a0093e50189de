"""Compact generalized non-local attention."""

import math

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks
from attention_jax.functional import cost
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.gating import rescale
from attention_jax.modules.layers import Conv, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class CGNL(nn.Module):
    """Compact generalized non-local: all positions and channels of a group meet, in linear time.

    With x `[..., h, w, c]`, n = h w, r the hidden width and G groups of c' = r / G consecutive
    channels::

        t = x Wt      p = x Wp      g = x Wg            Wt, Wp, Wg [c, r], no biases
        a = sum_{hw, c'} p g                            [..., G]            dot
        y = a t                                         [..., h, w, r]
        a_o = sum_{hw, c'} p^o g                        [..., G, order + 1] rbf, o = 0 .. order
        y = sum_o alpha_o a_o t^o                       alpha_o = exp(-2 gamma) (2 gamma)^o / o!
        out = x + norm(y Wz)                            Wz [r / G, c], a grouped 1x1 convolution

    norm is group normalisation of G groups. a is one number a group because the similarity of every
    (position, channel) with every other, `t_i p_j`, has rank one (rbf: its Taylor series has rank
    order + 1). `scale` divides a by `sqrt(c' n)`. The norm takes the size of a away but not its
    sign; where y vanishes the result is the norm's bias.

    Source: Yue, Sun, Yuan, Zhou, Ding, Xu, "Compact Generalized Non-local Network", NeurIPS 2018,
    arXiv 1810.13125; defaults from KaiyuYue/cgnl-network.pytorch model/resnet.py, `SpatialCGNL`
    (dot) and `SpatialCGNLx` (rbf), as its network builds and initialises them: order 3 (the class
    alone has 2), no scale, kernels N(0, 0.01^2), the norm's scale 0. A radial basis function has
    the factor `exp(-gamma (t^2 + p^2))`, for which the release, having dropped the normalisation of
    t and p, puts `exp(-2 gamma)`. With its gamma the term of order 0 is nearly all of y.

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        groups: G; divides c and r.
        mode: 'dot' or 'rbf'.
        order: last power of the series; of 'rbf' only.
        gamma: width of the radial basis function, a constant; of 'rbf' only.
        scale: divides a by `sqrt(c' n)`.
        norm_eps: added to the norm's variance.
        zero_init: the norm's scale starts at 0.
        residual: adds x.
        dtype: type of the computation; None is the input's. a and the norm are float32 inside.
        param_dtype: type of the parameters.
    """

    reduction: int = 2
    hidden: int | None = None
    groups: int = 8
    mode: str = 'dot'
    order: int = 3
    gamma: float = 1e-4
    scale: bool = False
    norm_eps: float = 1e-5
    zero_init: bool = True
    residual: bool = True
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to x `[..., h, w, c]` what its positions and channels gather from each other."""
        checks.feature_map(x)
        checks.choice('mode', self.mode, ('dot', 'rbf'))
        checks.at_least('order', self.order, 0)
        c = x.shape[-1]
        r = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        checks.divides('groups', self.groups, 'the hidden width', r)
        checks.divides('groups', self.groups, 'the channels', c)
        x = x.astype(self.dtype or x.dtype)
        settings = {
            'use_bias': False,
            'kernel_init': initializers.normal(0.01),
            'param_dtype': self.param_dtype,
        }
        t, p, g = (Dense(r, **settings, name=name)(x) for name in ('query', 'key', 'value'))
        y = self._attend(t, p, g)
        z = Conv(c, (1, 1), groups=self.groups, **settings, name='out')(y)
        z = nn.GroupNorm(
            num_groups=self.groups,
            epsilon=self.norm_eps,
            reduction_axes=(-3, -2, -1),  # further leading axes are batch
            use_fast_variance=False,
            scale_init=initializers.zeros if self.zero_init else initializers.ones,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            name='norm',
        )(z)
        return x + z if self.residual else z

    def _attend(self, t: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
        """Y from the three projections, all `[..., h, w, r]`."""
        powers = (1,) if self.mode == 'dot' else range(self.order + 1)
        cost.add('matmul', 2 * len(powers) * t.size)
        n, width = math.prod(t.shape[-3:-1]), t.shape[-1] // self.groups
        wide = statistics_type(t.dtype)
        p, g = p.astype(wide), g.astype(wide)
        sums = [(p**o * g).sum((-3, -2)) for o in powers]  # [..., r] each
        a = jnp.stack([reduce(s, '... (g c) -> ... g', 'sum', c=width) for s in sums], -1)
        a = a / math.sqrt(width * n) if self.scale else a
        sow_map(self, lambda: a[..., 0] if self.mode == 'dot' else a)
        spread = repeat(a, '... g o -> ... (g c) o', c=width)
        if self.mode == 'dot':
            return rescale(t, spread[..., 0])
        y, t_wide = 0.0, t.astype(wide)
        for o in reversed(powers):
            alpha = math.exp(-2 * self.gamma) * (2 * self.gamma) ** o / math.factorial(o)
            y = y * t_wide + alpha * spread[..., None, None, :, o]
        return y.astype(t.dtype)


register_attention(
    'cgnl',
    CGNL,
    paper='Compact Generalized Non-local Network',
    arxiv='1810.13125',
    year=2018,
    family='positions',
    complexity='N C^2/r',
    identity_at_init=lambda module: module.zero_init and module.residual,
    placement='inserted_before',
    variants={
        'authors': {},
        'authors_scale': {'scale': True},
        'authors_rbf': {'mode': 'rbf'},
        'authors_rbf_scale': {'mode': 'rbf', 'scale': True},
    },
    torch_names={
        'authors': {
            **pointwise({'t': 'query', 'p': 'key', 'g': 'value'}),
            'z.*': 'out/*',
            'gn.*': 'norm/*',
        }
    },
)
