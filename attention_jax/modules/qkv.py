"""The general attention block: query, key, value, and what is done with them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dot_product import WEIGHTINGS
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.positions import (
    SimilarityVector,
    add_gained,
    attend_positions,
    flatten_positions,
    pair_terms,
    pool_positions,
)
from attention_jax.modules.registry import TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class QKVAttention(nn.Module):
    """Attention put together from its parts.

    With x' the context if there is one, else x; n and m their positions; g = `heads` groups of
    consecutive features, L the length of the two vectors u, w that meet::

        q = x Wq + bq [..., n, d]     k = x' Wk + bk [..., m, d]     v = x' Wv + bv [..., m, e]
        S_ij = scale * similarity(q_i, k_j)         axis 'space':   vectors of d / g features
                                                    axis 'channel': vectors of all n positions
        P = weighting(S) over the last axis         [..., g, n, m], channel [..., g, d/g, d/g]
        y = P v                                     [..., n, e],    channel sum_j P_ij v_nj
        out = x + gamma norm(y Wo + bo)             Wo, norm, gamma and x as the field_names say

    Similarities: dot `u.w`; scaled_dot `u.w L^-1/2`; cosine `u.w / (max(|u|, 1e-12) max(|w|,
    1e-12))`; gaussian `-|u - w|^2 / (2 sigma^2)` (what non-local networks call so is dot of
    unprojected features); mlp `a.act(u + w)` with a `[L]`, and concat `relu(a.[u, w])` with a
    `[2L]`, shared by the heads. Weightings: softmax; sigmoid; mean, `S` over the length of the last
    axis; none, `S`; for gaussian the last two take `exp(S)`. Keys do not compete under sigmoid and
    none: the output grows with their number (a bias of `-log m` on the logits would cure it).

    Source: the frame in which the articles describe attention (their rewritings of CBAM are the
    variants 'channel' and 'spatial', their seven steps 'steps'); initialisers are ours, LeCun
    normal and zero biases. With the same parameters it equals, among others, `non_local`
    (`hidden=value_hidden=c // 2, pool_size=2, pool_position='before', output_projection=True,
    normalization='batch', residual='plain'`, its other modes by similarity, projections and
    weighting), `self_attention` and `pam` (`similarity='dot'`), `cam` (`axis='channel',
    projections='identity', similarity='dot', scale=-1`), `cross_layer_non_local` of one context by
    positions, and `downsampled_self_attention` put between an average pool and a resize.

    Attributes:
        axis: 'space', positions attend to positions; 'channel', features to features.
        spatial_dims: 1, 2 or 3 axes of positions, the last before c; all others are batch.
        projections: 'linear'; 'value', only v is projected (q = x, k = x'); 'identity', none is.
        reduction: divisor of the channels that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        value_reduction: divisor of the channels of x that gives e, rounded down.
        value_hidden: e itself; wins over `value_reduction`.
        similarity: 'dot', 'scaled_dot', 'cosine', 'gaussian', 'mlp' or 'concat'; the last three for
            'space' only.
        scale: a further factor of S.
        sigma: width of the gaussian.
        activation: of mlp, 'tanh' or 'relu'.
        weighting: 'softmax', 'sigmoid' (not of gaussian), 'mean' or 'none'.
        heads: groups of features.
        pool_size: window and stride of the pool of k and v over height and width; 1 is none.
        pool: 'max' or 'average'.
        pool_position: 'before' or 'after' the projections.
        output_projection: Wo, back to c features; needed where e is not c.
        normalization: 'batch', or None.
        residual: 'none'; 'plain', adds to x; 'gamma', adds to x with a gain that starts at 0.
        use_bias: biases of all projections.
        zero_init: with residual 'plain', what is added starts at 0: by the norm's scale, or by Wo
            where there is no norm (without either it does not).
        chunk_size: queries taken at a time; None chooses.
        dtype: type of the computation; None is the type of x. Logits and softmax are float32.
        param_dtype: type of the parameters.
    """

    axis: str = 'space'
    spatial_dims: int = 2
    projections: str = 'linear'
    reduction: int = 8
    hidden: int | None = None
    value_reduction: int = 1
    value_hidden: int | None = None
    similarity: str = 'scaled_dot'
    scale: float = 1.0
    sigma: float = 1.0
    activation: str = 'tanh'
    weighting: str = 'softmax'
    heads: int = 1
    pool_size: int = 1
    pool: str = 'max'
    pool_position: str = 'after'
    output_projection: bool = False
    normalization: str | None = None
    residual: str = 'gamma'
    use_bias: bool = True
    zero_init: bool = True
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Attends from x to the context, or to itself.

        Args:
            x: `[..., h, w, c]`, `[..., l, c]` or `[..., t, h, w, c]` by `spatial_dims`.
            context: a map that gives keys and values, of any size and channels, with the leading
                axes of x; None is x.
            train: uses the batch's statistics in the norm.
        """
        self._check(x, context)
        c = x.shape[-1]
        d, e = self._widths(c)
        x = x.astype(self.dtype or x.dtype)
        source = x if context is None else context.astype(x.dtype)
        y = self._attend(*self._project(x, source, d, e), x.shape)

        zero = self.zero_init and self.residual == 'plain'
        if self.output_projection:
            y = self._dense(c, 'out', zero=zero and self.normalization is None)(y)
        if self.normalization == 'batch':
            y = BatchNorm(
                scale_init=initializers.zeros if zero else initializers.ones,
                param_dtype=self.param_dtype,
                name='norm',
            )(y, train=train)
        if self.residual == 'gamma':
            return add_gained(self, x, y)
        return x + y if self.residual == 'plain' else y

    def _project(
        self, x: jax.Array, source: jax.Array, d: int, e: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value, as maps."""
        pool = functools.partial(
            pool_positions,
            size=self.pool_size,
            spatial_dims=self.spatial_dims,
            pool=functional.max_pool if self.pool == 'max' else functional.avg_pool,
        )
        before = self.pool_position == 'before'
        pooled = pool(source) if before else source
        query, key, value = x, pooled, pooled
        if self.projections == 'linear':
            query, key = self._dense(d, 'query')(x), self._dense(d, 'key')(pooled)
        if self.projections != 'identity':
            value = self._dense(e, 'value')(pooled)
        return query, *((key, value) if before else map(pool, (key, value)))

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """P v as a map."""
        if self.axis == 'channel':
            positions = math.prod(query.shape[-1 - self.spatial_dims : -1])
            options = {'heads': self.heads, 'spatial_dims': self.spatial_dims}
            weights = functional.channel_weights(
                query,
                key,
                similarity='cosine' if self.similarity == 'cosine' else 'dot',
                weighting=self.weighting,
                scale=self._scale(positions),
                **options,
            )
            sow_map(self, lambda: weights.astype(value.dtype))
            return functional.mix_channels(weights, value, **options)
        query, key, value = (flatten_positions(y, self.spatial_dims) for y in (query, key, value))
        if self.heads > 1:
            query, key, value = (
                rearrange(y, '... n (g f) -> ... g n f', g=self.heads) for y in (query, key, value)
            )
        if self.similarity in _LEARNED:
            y = self._attend_learned(query, key, value)
        else:
            y = attend_positions(
                self,
                query,
                key,
                value,
                similarity=self.similarity.removeprefix('scaled_'),
                weighting=self.weighting,
                scale=self._scale(query.shape[-1]),
                chunk_size=self.chunk_size,
            )
        if self.heads > 1:
            y = rearrange(y, '... g n f -> ... n (g f)')
        return y.reshape(*shape[:-1], -1)

    def _attend_learned(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Similarities with parameters of their own, `[..., n, e]`."""
        length, dtype = query.shape[-1], value.dtype
        rows = length if self.similarity == 'mlp' else 2 * length
        weight = SimilarityVector(rows, _INIT, self.param_dtype, name='similarity')()
        if self.similarity == 'mlp':
            weight, act = weight * self.scale, self.activation
        else:
            # relu(a.[u, w]) is relu of a number of the query plus one of the key: features of
            # length 1, and a weight that is the scale.
            query, key = (term[..., None] for term in pair_terms(weight, query, key))
            weight, act = jnp.full((1,), self.scale, query.dtype), 'relu'

        options = {'activation': act, 'weighting': self.weighting, 'chunk_size': self.chunk_size}

        def weights() -> jax.Array:
            # P I = P, and never all pairs of features at once.
            every = jnp.eye(key.shape[-2], dtype=dtype)
            rows = wanted_queries(self, query)
            return functional.additive_attend(rows, key, every, weight, **options).astype(dtype)

        sow_map(self, weights)
        if self.similarity == 'concat' and self.weighting in ('mean', 'none'):
            factor = self.scale * (key.shape[-2] if self.weighting == 'none' else 1)
            return functional.pairwise_relu_attend(query[..., 0], key[..., 0], value) * factor
        return functional.additive_attend(query, key, value, weight, **options).astype(dtype)

    def _scale(self, length: int) -> float:
        factor = {'scaled_dot': length**-0.5, 'gaussian': self.sigma**-2}
        return float(self.scale) * factor.get(self.similarity, 1.0)

    def _dense(self, features: int, name: str, zero: bool = False) -> Dense:
        return Dense(
            features,
            use_bias=self.use_bias,
            kernel_init=initializers.zeros if zero else _INIT,
            bias_init=initializers.zeros,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _widths(self, c: int) -> tuple[int, int]:
        """The widths d and e."""
        if self.projections != 'linear' and self.hidden not in (None, c):
            raise ValueError(
                f'hidden {self.hidden} needs projections of the query, got projections '
                f'{self.projections!r}: leave it out'
            )
        d = e = c
        if self.projections == 'linear':
            d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        if self.projections != 'identity':
            e = hidden_width(
                c, reduction=self.value_reduction, hidden=self.value_hidden, prefix='value_'
            )
        if e != c and not self.output_projection:
            raise ValueError(
                f'values of {e} features do not give the {c} channels of x back: set '
                f'output_projection, or value_reduction 1'
            )
        if self.axis == 'channel' and e != d:
            raise ValueError(
                f"axis 'channel' needs values of as many features as the query, got {e} and {d}: "
                f'set reduction and value_reduction alike'
            )
        for features in (d, e):
            checks.divides('heads', self.heads, 'the features', features)
        return d, e

    def _check(self, x: jax.Array, context: jax.Array | None) -> None:
        for name, allowed in _CHOICES.items():
            checks.choice(name, getattr(self, name), allowed)
        checks.feature_map(x, self.spatial_dims)
        if self.sigma <= 0:
            raise ValueError(f'sigma must be positive, got {self.sigma}')
        checks.at_least('chunk_size', self.chunk_size, 1)
        if self.similarity == 'gaussian' and self.weighting == 'sigmoid':
            raise ValueError("weighting 'sigmoid' has no meaning for similarity 'gaussian'")
        if self.projections == 'identity' and (self.hidden, self.value_hidden) != (None, None):
            raise ValueError(
                "hidden and value_hidden are widths of projections, got projections 'identity'"
            )
        if self.axis == 'channel':
            self._check_channel(context)
        if context is not None:
            checks.feature_map(context, self.spatial_dims, 'context')
            leading = -1 - self.spatial_dims
            if context.ndim != x.ndim or context.shape[:leading] != x.shape[:leading]:
                raise ValueError(
                    f'context must have the leading axes {x.shape[:leading]} of x, got shape '
                    f'{context.shape}'
                )
            if self.projections != 'linear' and context.shape[-1] != x.shape[-1]:
                raise ValueError(
                    f"context of {context.shape[-1]} channels needs projections 'linear' to meet "
                    f'the {x.shape[-1]} of x, got {self.projections!r}'
                )
        checks.pool_fits(x if context is None else context, self.pool_size, self.spatial_dims)

    def _check_channel(self, context: jax.Array | None) -> None:
        if context is not None:
            raise ValueError("context is for axis 'space', got axis 'channel'")
        if self.pool_size != 1:
            raise ValueError(f"pool_size {self.pool_size} is for axis 'space', got axis 'channel'")
        if self.similarity in ('gaussian', *_LEARNED):
            raise ValueError(
                f"similarity {self.similarity!r} is for axis 'space', got axis 'channel': use dot, "
                f'scaled_dot or cosine'
            )


_LEARNED = ('mlp', 'concat')
_INIT = initializers.lecun_normal()
_CHOICES = {
    'axis': ('space', 'channel'),
    'spatial_dims': (1, 2, 3),
    'projections': ('linear', 'value', 'identity'),
    'similarity': ('dot', 'scaled_dot', 'cosine', 'gaussian', *_LEARNED),
    'activation': ('tanh', 'relu'),
    'weighting': WEIGHTINGS,
    'pool': ('max', 'average'),
    'pool_position': ('before', 'after'),
    'normalization': (None, 'batch'),
    'residual': ('none', 'plain', 'gamma'),
}


def _torch_names(module: QKVAttention) -> TorchNames:
    layers = {name: name for name in ('query', 'key', 'value', 'out')}
    rest = {'similarity.*': 'similarity/*', 'norm.*': 'norm/*', 'gamma': 'gamma'}
    return {'authors': pointwise(layers, module.spatial_dims) | rest}


def _context_channels(arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """Query and key that read different channels read different maps."""
    channels = [arrays[name].shape[1] for name in ('query.weight', 'key.weight') if name in arrays]
    return tuple(channels[1:]) if len(set(channels)) > 1 else ()


register_attention(
    'qkv',
    QKVAttention,
    paper='Attention as query, key and value: similarity, normalisation and the axis they meet on',
    year=2021,
    family='positions',
    complexity='N^2 C + N C^2',
    identity_at_init=lambda module: (
        module.residual == 'gamma'
        or (
            module.residual == 'plain'
            and module.zero_init
            and (module.output_projection or module.normalization is not None)
        )
    ),
    variants={
        'channel': {'axis': 'channel', 'reduction': 1, 'similarity': 'dot', 'residual': 'none'},
        'spatial': {'reduction': 1, 'residual': 'none'},
        'steps': {'residual': 'plain'},
        'transformer': {'reduction': 1, 'heads': 4, 'output_projection': True, 'residual': 'none'},
        'cosine_sigmoid': {'similarity': 'cosine', 'weighting': 'sigmoid', 'residual': 'plain'},
        'mlp': {'similarity': 'mlp', 'heads': 2},
    },
    torch_names=_torch_names,
    context_channels=_context_channels,
)
