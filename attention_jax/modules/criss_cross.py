"""Criss-cross attention."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.positions import add_scaled, flatten_positions
from attention_jax.modules.registry import TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class CrissCrossAttention(nn.Module):
    """Criss-cross attention: each position gathers from its row and column, several times over.

    With x `[..., h, w, c]` and d the hidden width, one pass is::

        q = x Wq + bq      k = x Wk + bk      v = x Wv + bv       Wq, Wk [c, d], Wv [c, c]
        A[i, j] = softmax over the column (k, j), k != i, and the row (i, l) of q[i, j] . k
        y[i, j] = sum_k A[i, j, k] v[k, j] + sum_l A[i, j, h + l] v[i, l]
        out = x + gamma y                                         gamma a number, 0 at the start

    and `recurrence` passes follow each other with the same parameters. After two of them every
    position has met every other. Time and memory of the weights are O(n (h + w)), and nothing is
    gathered (`functional.criss_cross_attend`). There is no scale: logits grow with d. The own
    position counts once, in the row (copies without the mask count it twice). bk adds the same to
    all logits of a query, so its gradient is zero; at gamma = 0 that of every projection is.

    Source: Huang, Wang, Huang, Huang, Wei, Liu, "CCNet: Criss-Cross Attention for Semantic
    Segmentation", ICCV 2019, arXiv 1811.11721; defaults from speedinghzl/CCNet
    cc_attention/functions.py, `CrissCrossAttention`, with the two passes of the authors' training
    command (the loop over them is in their head, networks/ccnet.py), and PyTorch's initialisers.
    Their CUDA kernels order the weights row first, without the own entry of the column. Three
    spatial axes are Serge-weihao/CCNet-Pure-Pytorch networks/CC3d.py: lines along t, h and w, the
    own position in the one along w.

    Attributes:
        reduction: divisor of the channels that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        recurrence: number of passes.
        spatial_dims: 2 or 3 axes of positions, the last before c; all others are batch.
        use_bias: bq, bk, bv.
        dtype: type of the computation; None is the input's. Logits and softmax are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 8
    hidden: int | None = None
    recurrence: int = 2
    spatial_dims: int = 2
    use_bias: bool = True
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to each position of x what it gathers along the lines through it.

        The map is `[..., h, w, h + w]`, of which only rows `[..., q, h + w]` where some queries
        were asked for; with several passes each has its own, `pass_0` onwards.
        """
        checks.choice('spatial_dims', self.spatial_dims, (2, 3))
        checks.feature_map(x, self.spatial_dims)
        checks.at_least('recurrence', self.recurrence, 1)
        c = x.shape[-1]
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        x = x.astype(self.dtype or x.dtype)
        dense = functools.partial(Dense, use_bias=self.use_bias, param_dtype=self.param_dtype)
        project = [dense(d, name='query'), dense(d, name='key'), dense(c, name='value')]
        gamma = self.param('gamma', initializers.zeros, (1,), self.param_dtype)
        for i in range(self.recurrence):
            query, key, value = (layer(x) for layer in project)
            name = 'map' if self.recurrence == 1 else f'pass_{i}'
            sow_map(self, functools.partial(self._map, query, key), name)
            y = functional.criss_cross_attend(query, key, value, spatial_dims=self.spatial_dims)
            x = add_scaled(x, y, gamma)
        return x

    def _map(self, query: jax.Array, key: jax.Array) -> jax.Array:
        weights = functional.criss_cross_weights(query, key, spatial_dims=self.spatial_dims)
        every = flatten_positions(weights, self.spatial_dims)
        rows = wanted_queries(self, every)
        return weights if rows is every else rows


def _torch_names(module: CrissCrossAttention) -> TorchNames:
    """Names of the released class, whose 3-D form has the same ones."""
    layers = {'query_conv': 'query', 'key_conv': 'key', 'value_conv': 'value'}
    return {'authors': {**pointwise(layers, module.spatial_dims), 'gamma': 'gamma'}}


register_attention(
    'criss_cross',
    CrissCrossAttention,
    paper='CCNet: Criss-Cross Attention for Semantic Segmentation',
    arxiv='1811.11721',
    year=2019,
    family='positions',
    complexity='R N C (H + W + C)',
    identity_at_init=True,
    variants={'authors': {}, 'once': {'recurrence': 1}, 'video': {'spatial_dims': 3}},
    torch_names=_torch_names,
)
