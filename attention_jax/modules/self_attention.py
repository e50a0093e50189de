"""Self-attention of SAGAN."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.layers import Dense
from attention_jax.modules.positions import (
    add_gained,
    attend_positions,
    flatten_positions,
    pool_positions,
)
from attention_jax.modules.registry import Scheme, TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class SelfAttention(nn.Module):
    """Self-attention between all positions of a map, added with a gain that starts at zero.

    With the n positions of x, d and e features::

        q = x Wq + bq [..., n, d]      k = x Wk + bk [..., n, d]      v = x Wv + bv [..., n, e]
        A = softmax_m(q k^T)                                       [..., n, m]   no scale
        out = x + gamma A v                                        gamma a number, 0 at the start
        out = x + gamma (A v Wo + bo)                              with `output_projection`

    `pool_size` pools k and v, after their projections, from n to m positions; what a side leaves
    over is dropped. Logits grow with d. bk adds the same to all logits of a query, so its gradient
    is zero; at gamma = 0 that of every projection is.

    With `spectral_norm` a kernel W `[in, out]` is used as `W / s`, s its largest singular value by
    one step of the power iteration from a state u `[1, out]` in the collection `spectral`::

        v' = unit(u W^T)      u' = unit(v' W)      s = v' W u'^T       unit(a) = a / (|a| + 1e-12)

    in float32 at least. Every call uses u'; training stores it. The gradient flows through u' and
    v', as in the released graph (PyTorch's and Flax's layers stop it).

    Source: Zhang, Goodfellow, Metaxas, Odena, "Self-Attention Generative Adversarial Networks",
    ICML 2019, arXiv 1805.08318. The defaults are the form that most networks have, PyTorch's
    `Self_Attn` (heykeetae/Self-Attention-GAN sagan_models.py and the articles), with PyTorch's
    initialisers. The authors' TensorFlow graph (brain-research/self-attention-gan non_local.py,
    `sn_non_local_block_sim`) is the variant 'official': e = c / 2 and Wo, k and v pooled by 2, no
    biases, Xavier uniform kernels under spectral normalisation; it stores u' in evaluation too, and
    fails on odd sides.

    Attributes:
        reduction: divisor of the channels that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        value_reduction: divisor of the channels that gives e, rounded down.
        value_hidden: e itself; wins over `value_reduction`.
        output_projection: Wo; needed where e is not c.
        pool_size: window and stride of the maximum pool of k and v; 1 is none.
        use_bias: bq, bk, bv, bo.
        spectral_norm: divides each kernel by its spectral norm.
        chunk_size: queries taken at a time; None chooses.
        dtype: type of the computation; None is the input's. Logits and softmax are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 8
    hidden: int | None = None
    value_reduction: int = 1
    value_hidden: int | None = None
    output_projection: bool = False
    pool_size: int = 1
    use_bias: bool = True
    spectral_norm: bool = False
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to each position of x `[..., h, w, c]` what it gathers from the others.

        `train` stores the new state of the spectral norm and changes nothing else.
        """
        checks.feature_map(x)
        c = x.shape[-1]
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        e = hidden_width(
            c, reduction=self.value_reduction, hidden=self.value_hidden, prefix='value_'
        )
        if e != c and not self.output_projection:
            raise ValueError(
                f'values of {e} features cannot be added to {c} channels: set output_projection, '
                f'or value_reduction 1'
            )
        checks.pool_fits(x, self.pool_size)
        x = x.astype(self.dtype or x.dtype)

        def project(features: int, name: str, y: jax.Array) -> jax.Array:
            options = {'use_bias': self.use_bias, 'param_dtype': self.param_dtype, 'name': name}
            if self.spectral_norm:
                return _SpectralDense(features, **options)(y, train=train)
            return Dense(features, **options)(y)

        query = project(d, 'query', x)
        key = pool_positions(project(d, 'key', x), self.pool_size)
        value = pool_positions(project(e, 'value', x), self.pool_size)
        rows = map(flatten_positions, (query, key, value))
        y = attend_positions(self, *rows, scale=1.0, chunk_size=self.chunk_size)
        y = y.reshape(*x.shape[:-1], e)
        return add_gained(self, x, project(c, 'out', y) if self.output_projection else y)


class _SpectralDense(nn.Module):
    """A linear layer over the last axis whose kernel is divided by its spectral norm."""

    features: int
    use_bias: bool
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', initializers.xavier_uniform(), shape, self.param_dtype)
        start, u_shape = initializers.truncated_normal(1.0), (1, self.features)
        state = self.variable(
            'spectral', 'u', lambda: start(self.make_rng('params'), u_shape, jnp.float32)
        )
        wide = statistics_type(kernel.dtype)
        w = kernel.astype(wide)
        dot = functools.partial(jnp.matmul, precision='highest')
        v = _unit(dot(state.value.astype(wide), w.T))
        u = _unit(dot(v, w))
        norm = dot(dot(v, w), u.T)
        if train and not self.is_initializing():
            state.value = u.astype(state.value.dtype)
        y = functional.dense(x, (w / norm).astype(x.dtype))
        if self.use_bias:
            bias = self.param('bias', initializers.zeros, (self.features,), self.param_dtype)
            y = y + expand_to(bias.astype(x.dtype), y)
        return y


def _unit(a: jax.Array) -> jax.Array:
    return a / (jnp.linalg.norm(a) + 1e-12)


def _torch_names(module: SelfAttention) -> TorchNames:
    """The names of the article's class, and those of the TensorFlow graph."""
    article = pointwise({'query_conv': 'query', 'key_conv': 'key', 'value_conv': 'value'})
    official: Scheme = {'sigma_ratio': ('gamma', '-> 1')}
    for theirs, ours in (('theta', 'query'), ('phi', 'key'), ('g', 'value'), ('attn', 'out')):
        official[f'sn_conv_{theirs}/w'] = (f'{ours}/kernel', '1 1 i o -> i o')
        official[f'sn_conv_{theirs}/u'] = f'{ours}/u'
    article['gamma'] = 'gamma'
    authors = official if module.output_projection else article
    return {'authors': authors, 'article': article, 'official': official}


register_attention(
    'self_attention',
    SelfAttention,
    paper='Self-Attention Generative Adversarial Networks',
    arxiv='1805.08318',
    year=2019,
    family='positions',
    complexity='N^2 C + N C^2',
    identity_at_init=True,
    variants={
        'article': {},
        'official': {
            'value_reduction': 2,
            'output_projection': True,
            'pool_size': 2,
            'use_bias': False,
            'spectral_norm': True,
        },
    },
    torch_names=_torch_names,
)
