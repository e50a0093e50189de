"""Non-local attention of one layer to others."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.positions import attend_positions, flatten_positions, logit_scale
from attention_jax.modules.registry import pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class CrossLayerNonLocal(nn.Module):
    """Each position of one map gathers from all positions of other layers' maps.

    With the n positions of x, and R responses o_r of m_r positions and c_r channels::

        q = x Wq                      [..., n, d]      one for all responses
        k_r = o_r Wk_r                [..., m_r, d]
        v_r = o_r Wv_r                [..., m_r, d]
        y_r = softmax_m(d^-1/2 q k_r^T) v_r            [..., n, d]
        out = x + sum_r norm_r(y_r Wo)                 Wo [d, c], one for all responses

    The released code takes the n x d numbers of y_r in their order as a map of d channels, without
    the transposition that this needs, so that position and channel are interleaved. The default
    `layout='released'` is that function, which is what was trained: it does not follow a
    permutation of the positions. `layout='positions'` is what the paper means.

    Time and memory grow with n times the sum of the m_r: let the smallest map ask. Responses run
    with their own statistics, and may have any size.

    Source: Ye, Hu, Liu, Xia, Lyu, Liu, "Associating Multi-scale Receptive Fields for Fine-grained
    Recognition", ICIP 2020, arXiv 2005.09153; defaults from FouriYe/CNL-ICIP2020 cnlnet_5CNL.py,
    `CNL_5`, and its network, which adds x: no biases, kernels N(0, 0.01^2), norms' scales 0. The
    articles' version (variant 'article') has one response, no norm and does not add x; as printed
    it multiplies the map elementwise and lacks the same transposition.

    Attributes:
        reduction: divisor of the channels of x that gives d, rounded down.
        hidden: d itself; wins over `reduction`.
        scale: 'hidden', d^-1/2; 'input', c^-1/2; a number; None, 1.
        layout: 'released' or 'positions'.
        normalization: 'batch', a norm for each response, or None.
        norm_eps: of those norms.
        norm_momentum: of those norms, in Flax's sense.
        zero_init: the norms' scales start at 0, or Wo where there is no norm.
        use_bias: biases of all projections.
        share_output: one Wo for all responses; else one for each.
        residual: adds x.
        chunk_size: queries taken at a time; None chooses.
        dtype: type of the computation; None is the type of x. Logits and softmax are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 8
    hidden: int | None = None
    scale: str | float | None = 'hidden'
    layout: str = 'released'
    normalization: str | None = 'batch'
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9
    zero_init: bool = True
    use_bias: bool = False
    share_output: bool = True
    residual: bool = True
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, others: jax.Array | Sequence[jax.Array], *, train: bool = False
    ) -> jax.Array:
        """Adds to each position of x `[..., h, w, c]` what it gathers from the responses.

        Args:
            x: the map that asks.
            others: one response `[..., h_r, w_r, c_r]` or a sequence of them, with the leading axes
                of x.
            train: the norms use the batch's statistics.
        """
        responses = tuple(others) if isinstance(others, list | tuple) else (others,)
        self._check(x, responses)
        c = x.shape[-1]
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        scale = logit_scale(self.scale, c, d)
        x = x.astype(self.dtype or x.dtype)
        small, zeros = initializers.normal(0.01), initializers.zeros
        settings = {'bias_init': zeros, 'param_dtype': self.param_dtype}
        dense = functools.partial(Dense, use_bias=self.use_bias, kernel_init=small, **settings)
        zero_out = self.zero_init and self.normalization is None
        output = functools.partial(dense, c, kernel_init=zeros if zero_out else small)
        shared = output(name='out') if self.share_output else None
        # The order in which the n d numbers of a result are read as a map.
        read = {'released': '... (d h w) -> ... h w d', 'positions': '... (h w d) -> ... h w d'}

        query = flatten_positions(dense(d, name='query')(x))
        out = x if self.residual else jnp.zeros_like(x)
        for r, response in enumerate(responses):
            response = response.astype(x.dtype)
            y = attend_positions(
                self,
                query,
                flatten_positions(dense(d, name=f'key_{r}')(response)),
                flatten_positions(dense(d, name=f'value_{r}')(response)),
                scale=scale,
                chunk_size=self.chunk_size,
                name='map' if len(responses) == 1 else f'map_{r}',
            )
            y = rearrange(y, '... n d -> ... (n d)')
            y = rearrange(y, read[self.layout], h=x.shape[-3], w=x.shape[-2])
            y = (shared or output(name=f'out_{r}'))(y)
            if self.normalization == 'batch':
                y = BatchNorm(
                    momentum=self.norm_momentum,
                    epsilon=self.norm_eps,
                    scale_init=zeros if self.zero_init else initializers.ones,
                    param_dtype=self.param_dtype,
                    name=f'norm_{r}',
                )(y, train=train)
            out = out + y
        return out

    def _check(self, x: jax.Array, responses: Sequence[jax.Array]) -> None:
        checks.feature_map(x)
        checks.choice('layout', self.layout, ('released', 'positions'))
        checks.choice('normalization', self.normalization, (None, 'batch'))
        if not responses:
            raise ValueError('others must hold at least one response map, got none')
        for response in responses:
            if response.ndim != x.ndim or response.shape[:-3] != x.shape[:-3]:
                raise ValueError(
                    f'others must be maps [..., h, w, c] with the leading axes {x.shape[:-3]} of '
                    f'x, got shape {response.shape}'
                )
            checks.feature_map(response, name='others')


def _context_channels(arrays: Mapping[str, Any]) -> tuple[tuple[int, ...]]:
    """The channels of the responses, from the released names of their projections."""
    found = {
        int(match[1]): array.shape[1]
        for name, array in arrays.items()
        if (match := re.fullmatch(r'p(\d+)\.weight', name))
    }
    return (tuple(found[r] for r in sorted(found)),)


register_attention(
    'cross_layer_non_local',
    CrossLayerNonLocal,
    paper='Associating Multi-scale Receptive Fields for Fine-grained Recognition',
    arxiv='2005.09153',
    year=2020,
    family='positions',
    complexity='N M C/r + (N + M) C^2/r',
    identity_at_init=lambda module: module.zero_init and module.residual,
    placement='none',
    variants={
        'authors': {},
        'positions': {'layout': 'positions'},
        'article': {
            'layout': 'positions',
            'normalization': None,
            'residual': False,
            'zero_init': False,
        },
    },
    torch_names={
        'authors': {
            **pointwise({'t': 'query', 'z': 'out', 'p{r}': 'key_{r}', 'g{r}': 'value_{r}'}),
            'bn{r}.*': 'norm_{r}/*',
        }
    },
    context_channels=_context_channels,
    maps=2,
)
