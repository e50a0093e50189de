"""Double attention (A2-Nets)."""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.positions import flatten_positions
from attention_jax.modules.registry import pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class DoubleAttention(nn.Module):
    """Double attention: a few descriptors of the whole map, handed back to every position.

    With the n positions of x, m the hidden width and k descriptors::

        F = x Wa + ba                             [..., n, m]
        B = softmax over positions (x Wb + bb)    [..., n, k]    attention maps of the descriptors
        V = softmax over descriptors (x Wv + bv)  [..., n, k]    attention vectors of the positions
        G = B^T F                                 [..., k, m]    gather
        Z = V G                                   [..., n, m]    distribute
        out = x + norm(Z Wo + bo)                 Wo [m, c]

    The same by `association='pairwise'` is `Z = (V B^T) F` with a map `[..., n, n]`: n^2 numbers in
    memory, where the first takes k m, and `n^2 (k + m)` multiply-accumulates instead of `2 n k m`.
    It is worth it for that map, or for n below `2 k m / (k + m)`. bb shifts all logits of a
    softmax alike, so its gradient is zero; with one descriptor V is 1, and Wv learns nothing.

    Source: Chen, Kalantidis, Li, Yan, Feng, "A^2-Nets: Double Attention Networks", NeurIPS 2018,
    arXiv 1810.11579. There is no released code of the authors; defaults from
    nguyenvo09/Double-Attention-Network double_attention_layer.py, `DoubleAttentionLayer`, which
    agrees with the equations, with the paper's residual (that class returns Z, or Z Wo + bo) and
    PyTorch's initialisers. The class `DoubleAtten`, found in many repositories, has both softmaxes
    over the positions, divides G by n and returns Z: the variant 'double_atten', with a result of
    the order of k / n^2. Others take the softmax over the batch, which mixes samples, or contract V
    with the channels of G: not offered.

    Attributes:
        spatial_dims: 1, 2 or 3 axes of positions, the last before c; all others are batch.
        reduction: divisor of the channels that gives m, rounded down.
        hidden: m itself; wins over `reduction`.
        descriptors: k; None is m.
        gather: 'sum', or 'mean', which divides G by n.
        distribute: axis of the softmax of V: 'descriptors' or 'positions'.
        association: 'gather' or 'pairwise'.
        reconstruct: Wo, bo; without it the result has m channels.
        residual: adds x.
        normalization: 'batch', a batch normalisation after Wo; or None.
        zero_init: the norm's scale starts at 0, or Wo and bo where there is no norm.
        use_bias: ba, bb, bv, bo.
        dtype: type of the computation; None is the input's. Both softmaxes are float32.
        param_dtype: type of the parameters.
    """

    spatial_dims: int = 2
    reduction: int = 4
    hidden: int | None = None
    descriptors: int | None = None
    gather: str = 'sum'
    distribute: str = 'descriptors'
    association: str = 'gather'
    reconstruct: bool = True
    residual: bool = True
    normalization: str | None = None
    zero_init: bool = False
    use_bias: bool = True
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gathers descriptors of x and adds what they give to each position.

        Maps: `gather_map` B^T `[..., k, n]`, `distribute_map` V `[..., n, k]`; by 'pairwise' also
        `pair_map` V B^T `[..., n, n]`, of which only the rows of the queries asked for.
        """
        c = x.shape[-1]
        m, k = self._widths(x)
        x = x.astype(self.dtype or x.dtype)
        dense = functools.partial(Dense, use_bias=self.use_bias, param_dtype=self.param_dtype)
        positions = tuple(range(-1 - self.spatial_dims, -1))
        feature = dense(m, name='feature')(x)
        gather = _softmax(dense(k, name='gather')(x), positions)
        if self.gather == 'mean':
            gather = gather / math.prod(x.shape[axis] for axis in positions)
        over = -1 if self.distribute == 'descriptors' else positions
        distribute = _softmax(dense(k, name='distribute')(x), over)
        z = self._attend(feature, gather, distribute)
        if self.reconstruct:
            zero_out = self.zero_init and self.normalization is None
            init = {'kernel_init': initializers.zeros, 'bias_init': initializers.zeros}
            z = dense(c, **init if zero_out else {}, name='out')(z)
        if self.normalization == 'batch':
            scale_init = initializers.zeros if self.zero_init else initializers.ones
            norm = BatchNorm(scale_init=scale_init, param_dtype=self.param_dtype, name='norm')
            z = norm(z, train=train)
        return x + z if self.residual else z

    def _attend(self, feature: jax.Array, gather: jax.Array, distribute: jax.Array) -> jax.Array:
        """Z on the positions of F, both `[..., *spatial, m]`."""
        rows = functools.partial(flatten_positions, spatial_dims=self.spatial_dims)
        sow_map(self, lambda: rearrange(rows(gather), '... n k -> ... k n'), 'gather_map')
        sow_map(self, lambda: rows(distribute), 'distribute_map')
        f, b, v = feature, gather.astype(feature.dtype), distribute.astype(feature.dtype)
        if self.association == 'gather':
            axes = 'thw'[-self.spatial_dims :]
            g = contract(f'...{axes}k,...{axes}m->...km', b, f).astype(f.dtype)
            return contract(f'...{axes}k,...km->...{axes}m', v, g).astype(f.dtype)

        def pair_map() -> jax.Array:
            wanted = wanted_queries(self, rows(distribute))
            return contract('...ik,...jk->...ij', wanted, rows(gather), count=None)

        sow_map(self, pair_map, 'pair_map')
        pairs = contract('...ik,...jk->...ij', rows(v), rows(b)).astype(f.dtype)
        return contract('...ij,...jm->...im', pairs, rows(f)).astype(f.dtype).reshape(f.shape)

    def _widths(self, x: jax.Array) -> tuple[int, int]:
        """Checks the arguments; the hidden width and the number of descriptors."""
        checks.choice('spatial_dims', self.spatial_dims, (1, 2, 3))
        checks.feature_map(x, self.spatial_dims)
        checks.choice('gather', self.gather, ('sum', 'mean'))
        checks.choice('distribute', self.distribute, ('descriptors', 'positions'))
        checks.choice('association', self.association, ('gather', 'pairwise'))
        checks.choice('normalization', self.normalization, (None, 'batch'))
        c = x.shape[-1]
        m = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        k = m if self.descriptors is None else self.descriptors
        checks.at_least('descriptors', k, 1)
        if not self.reconstruct:
            for name in ('normalization', 'zero_init'):
                if getattr(self, name):
                    raise ValueError(f'{name} is of the output projection: set reconstruct, too')
            if self.residual and m != c:
                raise ValueError(
                    f'a hidden width of {m} cannot be added to {c} channels: set reconstruct, '
                    f'or residual=False, or reduction 1'
                )
        return m, k


def _softmax(logits: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    return jax.nn.softmax(logits.astype(statistics_type(logits.dtype)), axes)


register_attention(
    'double_attention',
    DoubleAttention,
    paper='A2-Nets: Double Attention Networks',
    arxiv='1810.11579',
    year=2018,
    family='positions',
    complexity='N C^2/r',
    identity_at_init=lambda module: module.zero_init and module.residual,
    placement='inserted',
    variants={
        'paper': {},
        'paper_pairwise': {'association': 'pairwise'},
        'video': {'spatial_dims': 3},
        'batch_norm': {'normalization': 'batch', 'zero_init': True},
        'nguyenvo09': {'residual': False},
        'nguyenvo09_core': {'reduction': 1, 'reconstruct': False, 'residual': False},
        'double_atten': {
            'reduction': 1,
            'gather': 'mean',
            'distribute': 'positions',
            'reconstruct': False,
            'residual': False,
        },
    },
    torch_names={
        'authors': pointwise(
            {
                'convA': 'feature',
                'convB': 'gather',
                'convV': 'distribute',
                'conv_reconstruct': 'out',
            }
        )
    },
)
