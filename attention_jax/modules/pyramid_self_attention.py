"""Self-attention in regions of several sizes: the pyramid module of STANet."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.registry import pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class PyramidSelfAttention(nn.Module):
    """Self-attention within regions of a map, at several sizes of region, joined by a projection.

    The width of x holds `images` pictures side by side. With p = avg_pool(x, s), L levels, and for
    the level of scale r each picture cut into r x r equal regions, the one at (i, j) of all
    pictures together being one set of m positions::

        q = norm(p Wq + bq)      k = norm(p Wk + bk)      v = p Wv + bv      each level its own
        y = softmax_m(d^-1/2 q k^T) v      within each set             [..., h/s, w/s, c] put back
        out = upsample(concat_levels(y) Wo, s)                         Wo [L c, c], no bias, no norm

    Level 1 alone attends over the whole map; each further one costs 1 / r^2 of it. bk and the bias
    of k's norm have no gradient. The map of a level is `[..., r, r, m, m]`, positions of a set by
    row, column, picture; where only some queries are asked for, `[..., queries, m]`, each in its
    own set.

    Source: Chen and Shi, "A Spatial-Temporal Attention-Based Method and a New Dataset for Remote
    Sensing Image Change Detection", Remote Sensing 12(10), 2020 (STANet); defaults from
    justchenhao/STANet models/PAM2.py, `PAM`, with the scales of its CDSA. Its code for uneven
    regions raises, so that here the scales must divide the sides. Kernels start as N(0, 0.02^2),
    as the authors' network sets them, biases as PyTorch's.

    Attributes:
        scales: regions a side, one number a level.
        images: pictures side by side, 2 for STANet's pairs; 1 for an ordinary map.
        pool_size: s; 1 is none.
        reduction: divisor of the channels that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        residual: adds x.
        chunk_size: queries taken at a time; None chooses.
        dtype: type of the computation; None is the input's. Statistics and softmax are float32.
        param_dtype: type of the parameters.
    """

    scales: tuple[int, ...] = (1, 2, 4, 8)
    images: int = 2
    pool_size: int = 1
    reduction: int = 8
    hidden: int | None = None
    residual: bool = False
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Attends within the regions of x `[..., h, w, c]`; `train` is for the norms."""
        checks.feature_map(x)
        h, w, c = x.shape[-3:]
        if not self.scales:
            raise ValueError(f'scales must name at least one level, got {self.scales!r}')
        checks.divides('images', self.images, 'the width of x', w)
        for side in (h, w):
            checks.divides('pool_size', self.pool_size, 'the sides of x, got', side)
        checks.divides('pool_size', self.pool_size, 'the width of a picture', w // self.images)
        for r in self.scales:
            for side in (h, w // self.images):
                side //= self.pool_size
                checks.divides('scales', r, 'the pooled sides of a picture in x, got', side)
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        checks.at_least('chunk_size', self.chunk_size, 1)
        x = x.astype(self.dtype or x.dtype)

        p = functional.avg_pool(x, self.pool_size) if self.pool_size > 1 else x
        settings = (self.images, d, self.chunk_size, self.param_dtype)
        levels = [
            _Level(r, *settings, name=f'level_{i}')(p, train=train)
            for i, r in enumerate(self.scales)
        ]
        init = {'kernel_init': _KERNEL, 'param_dtype': self.param_dtype}
        y = Dense(c, use_bias=False, **init, name='out')(jnp.concatenate(levels, -1))
        # The projection before the resize: they commute, and the small map is cheaper.
        y = functional.upsample(y, self.pool_size)
        return x + y if self.residual else y


# A map cut into regions, those at the same place of all its pictures together.
_CUT = '... (r1 hh) (im r2 ww) f -> ... r1 r2 (hh ww im) f'
_KERNEL = initializers.normal(0.02)


class _Level(nn.Module):
    """Self-attention within the regions of one scale."""

    scale: int
    images: int
    hidden: int
    chunk_size: int | None
    param_dtype: Dtype

    @nn.compact
    def __call__(self, p: jax.Array, *, train: bool) -> jax.Array:
        def project(features: int, name: str) -> jax.Array:
            return Dense(features, kernel_init=_KERNEL, param_dtype=self.param_dtype, name=name)(p)

        def normalized(name: str) -> jax.Array:
            norm = BatchNorm(param_dtype=self.param_dtype, name=f'{name}_norm')
            return norm(project(self.hidden, name), train=train)

        axes = {'r1': self.scale, 'r2': self.scale, 'im': self.images}
        query, key, value = (
            rearrange(y, _CUT, **axes)
            for y in (normalized('query'), normalized('key'), project(p.shape[-1], 'value'))
        )
        sow_map(self, lambda: self._map(query, key, p.shape))
        y = functional.attend(query, key, value, chunk_size=self.chunk_size)
        left, right = _CUT.split('->')
        rows = p.shape[-3] // self.scale
        return rearrange(y, f'{right}->{left}', **axes, hh=rows)

    def _map(self, query: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The weights of every set, or of the sets that hold the queries asked for."""
        h, w = shape[-3:-1]
        n = h * w
        every = jnp.arange(n)[:, None]
        asked = wanted_queries(self, every)
        if asked is every:
            return functional.attention_weights(query, key)
        axes = {'r1': self.scale, 'r2': self.scale, 'im': self.images}
        cells = rearrange(jnp.arange(n).reshape(h, w, 1), _CUT, **axes)
        # Where each position of the map went: its place among all the sets, one after another.
        place = jnp.argsort(cells.reshape(-1))[asked[:, 0]]
        m = query.shape[-2]
        rows = rearrange(query, '... r1 r2 m f -> ... (r1 r2 m) f')
        sets = rearrange(key, '... r1 r2 m f -> ... (r1 r2) m f')
        weights = functional.attention_weights(
            jnp.take(rows, place, -2)[..., None, :], jnp.take(sets, place // m, -3)
        )
        return weights[..., 0, :]


def _example(shape: Sequence[int]) -> dict[str, Any]:
    """One picture a map, where the default is two side by side, and scales that divide the map."""
    most = math.gcd(8, *shape[-3:-1])
    scales = {} if most == 8 else {'scales': tuple(r for r in (1, 2, 4) if r <= most)}
    return {'images': 1, **scales}


register_attention(
    'pyramid_self_attention',
    PyramidSelfAttention,
    paper='A Spatial-Temporal Attention-Based Method and a New Dataset for Remote Sensing Image '
    'Change Detection',
    year=2020,
    family='positions',
    complexity='N^2 C + N C^2',
    variants={'authors': {}},
    example=_example,
    torch_names={
        'authors': {
            **pointwise(
                {
                    'stages.{i}.f_key.0': 'level_{i}/key',
                    'stages.{i}.f_query.0': 'level_{i}/query',
                    'stages.{i}.f_value': 'level_{i}/value',
                    'conv_bn.0': 'out',
                }
            ),
            'stages.{i}.f_key.1.*': 'level_{i}/key_norm/*',
            'stages.{i}.f_query.1.*': 'level_{i}/query_norm/*',
        }
    },
)
