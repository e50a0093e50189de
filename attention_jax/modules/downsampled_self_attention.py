"""Self-attention on a downsampled map: the basic module of STANet."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import Dense
from attention_jax.modules.positions import (
    add_gained,
    attend_positions,
    flatten_positions,
    logit_scale,
)
from attention_jax.modules.registry import TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class DownsampledSelfAttention(nn.Module):
    """Self-attention between the cells of an averaged map, spread over the map again.

    With s the pool size, the n = h w / s^2 cells of p and d the hidden width::

        p = avg_pool(x, s)                                            [..., h/s, w/s, c]
        q = p Wq + bq [..., n, d]    k = p Wk + bk [..., n, d]    v = p Wv + bv [..., n, c]
        A = softmax_m(d^-1/2 q k^T)                                   [..., n, n]
        out = x + upsample(A v, s)                                    [..., h, w, c]

    bk adds the same to all logits of a query, so its gradient is zero.

    Source: Chen and Shi, "A Spatial-Temporal Attention-Based Method and a New Dataset for Remote
    Sensing Image Change Detection", Remote Sensing 12(10), 2020 (STANet); defaults from
    justchenhao/STANet models/BAM.py, `BAM` ("basic self-attention module": not the Bottleneck
    Attention Module, which is `bam`). The class pools by 8, the authors' command line by 1. Every
    value is repeated s x s times; the article that shows the class says bilinear, which is
    `resize`, and a scale of c^-1/2, `scale='input'`. The class declares a gain and leaves it out:
    `use_gamma`. STANet puts two images side by side in one map. Kernels start as N(0, 0.02^2), as
    the authors' network sets them, biases as PyTorch's.

    Attributes:
        pool_size: s, which divides both sides; 1 is the map itself.
        reduction: divisor of the channels that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        scale: 'hidden', d^-1/2; 'input', c^-1/2; a number; None, 1.
        resize: 'nearest', or 'bilinear' with corners not aligned.
        residual: adds x.
        use_gamma: multiplies what is added by a learned number that starts at 0.
        use_bias: bq, bk, bv.
        chunk_size: queries taken at a time; None chooses.
        dtype: type of the computation; None is the input's. Pool and softmax are float32.
        param_dtype: type of the parameters.
    """

    pool_size: int = 8
    reduction: int = 8
    hidden: int | None = None
    scale: str | float | None = 'hidden'
    resize: str = 'nearest'
    residual: bool = True
    use_gamma: bool = False
    use_bias: bool = True
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to each position of x `[..., h, w, c]` what its cell gathers from all cells."""
        checks.feature_map(x)
        checks.choice('resize', self.resize, ('nearest', 'bilinear'))
        for side in x.shape[-3:-1]:
            checks.divides('pool_size', self.pool_size, 'the sides of x, got', side)
        c = x.shape[-1]
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        scale = logit_scale(self.scale, c, d)
        x = x.astype(self.dtype or x.dtype)
        settings = {'kernel_init': initializers.normal(0.02), 'param_dtype': self.param_dtype}
        project = functools.partial(Dense, use_bias=self.use_bias, **settings)

        p = functional.avg_pool(x, self.pool_size) if self.pool_size > 1 else x
        query, key, value = (
            flatten_positions(project(features, name=name)(p))
            for features, name in ((d, 'query'), (d, 'key'), (c, 'value'))
        )
        y = attend_positions(self, query, key, value, scale=scale, chunk_size=self.chunk_size)
        y = functional.upsample(y.reshape(p.shape), self.pool_size, self.resize)
        start = x if self.residual else jnp.zeros_like(x)
        return add_gained(self, start, y) if self.use_gamma else start + y


def _torch_names(module: DownsampledSelfAttention) -> TorchNames:
    """The released class always holds a gain, and never uses it."""
    layers = pointwise({'query_conv': 'query', 'key_conv': 'key', 'value_conv': 'value'})
    return {'authors': {**layers, 'gamma': 'gamma' if module.use_gamma else None}}


def _example(shape: Sequence[int]) -> dict[str, int]:
    """The default pool, or the largest one below that divides the sides."""
    pool_size = math.gcd(8, *shape[-3:-1])
    return {} if pool_size == 8 else {'pool_size': pool_size}


register_attention(
    'downsampled_self_attention',
    DownsampledSelfAttention,
    paper='A Spatial-Temporal Attention-Based Method and a New Dataset for Remote Sensing Image '
    'Change Detection',
    year=2020,
    family='positions',
    complexity='N C + N C^2/s^2 + N^2 C/s^4',
    variants={
        'authors': {},
        'command_line': {'pool_size': 1},
        'bilinear': {'resize': 'bilinear'},
        'gamma': {'use_gamma': True},
    },
    torch_names=_torch_names,
    example=_example,
)
