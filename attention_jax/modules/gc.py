"""Global context."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional import cost
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import gate, rescale
from attention_jax.modules.initializers import Initializer, torch_kernel
from attention_jax.modules.layers import Dense, LayerNorm
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import ForeignName, TorchName, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class GlobalContext(nn.Module):
    """Global context: one attention map for all queries, and a bottleneck on what it gathers.

    With x `[..., h, w, c]` and r the hidden width::

        a = softmax_hw(x wm + bm)                        [..., h, w]   pooling: attention
        ctx = sum_hw a x                                 [..., c]      average: mean_hw x
        f(ctx) = relu(norm(ctx W1 + b1)) W2 + b2         [..., c]      bottleneck; W1 [c, r]
        f(ctx) = ctx Wv + bv                             [..., c]      linear
        out = x * gate(f_mul(ctx)) + f_add(ctx)          each only if in `fusion`

    norm is layer normalisation over the r features; multiplication comes first, and both branches
    read the same ctx. bm shifts all logits alike, so its gradient is zero. With r = 1 the norm's
    output is its bias, and W1 learns nothing.

    Source: Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and
    Beyond", ICCV workshops 2019, arXiv 1904.11492; defaults from xvjiarui/GCNet
    mmdet/ops/gcb/context_block.py, `ContextBlock`, with reduction 16 of the r16 configs (r4 is the
    other one). `transform='linear'` is the paper's simplified non-local block, of which there is no
    released code. timm's `GlobalContext` multiplies, reduces by 8 (rounding to the nearest integer:
    give `hidden`), has epsilon 1e-6, and zeroes only the last kernel of an added branch. The linear
    layers start as the authors' do: wm normal of variance 2 / c, W1 PyTorch's default.

    Attributes:
        reduction: divisor of the channels that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        pooling: 'attention' or 'average'.
        fusion: 'add', 'multiply' or both, as a tuple.
        transform: 'bottleneck', or 'linear', which can only be added.
        norm_eps: added to the norm's variance.
        gate: 'sigmoid' or 'hard_sigmoid' (`clip(v + 3, 0, 6) / 6`), of the multiplied branch.
        zero_init: the last layer of each branch starts at zero: an added branch is then nothing, a
            multiplied one gate(0). Without it that layer starts as PyTorch's do.
        dtype: type of the computation; None is the input's. Map, context and branches are float32.
        param_dtype: type of the parameters.
    """

    reduction: int = 16
    hidden: int | None = None
    pooling: str = 'attention'
    fusion: tuple[str, ...] = ('add',)
    transform: str = 'bottleneck'
    norm_eps: float = 1e-5
    gate: str = 'sigmoid'
    zero_init: bool = True
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds the global context to x `[..., h, w, c]`, or gates its channels by it."""
        checks.feature_map(x)
        checks.choice('pooling', self.pooling, ('attention', 'average'))
        checks.choice('transform', self.transform, ('bottleneck', 'linear'))
        fusion = self.fusion
        if not fusion or len(set(fusion)) < len(fusion) or not set(fusion) <= {'add', 'multiply'}:
            raise ValueError(
                f"fusion must be ('add',), ('multiply',) or ('add', 'multiply'), got {fusion!r}"
            )
        if self.transform == 'linear' and 'multiply' in fusion:
            raise ValueError("fusion 'multiply' needs transform 'bottleneck', got 'linear'")
        to_gate = gate(self.gate)
        c = x.shape[-1]
        r = None
        if self.transform == 'bottleneck':
            r = hidden_width(c, reduction=self.reduction, hidden=self.hidden)
        x = x.astype(self.dtype or x.dtype)

        context = self._attend(x) if self.pooling == 'attention' else functional.spatial_mean(x)
        branch = functools.partial(
            _Branch,
            hidden=r,
            norm_eps=self.norm_eps,
            last_init=initializers.zeros if self.zero_init else None,
            param_dtype=self.param_dtype,
        )
        out = x
        if 'multiply' in fusion:
            out = rescale(out, to_gate(branch(name='multiply')(context)))
        if 'add' in fusion:
            added = branch(name='add')(context)
            out = out + jnp.expand_dims(added, (-3, -2)).astype(x.dtype)
        return out

    def _attend(self, x: jax.Array) -> jax.Array:
        """The mean of x under the attention map, `[..., c]`."""
        logits = _Mask(param_dtype=self.param_dtype, name='mask')(x)
        weights = jax.nn.softmax(logits, axis=(-2, -1))
        sow_map(self, lambda: weights)
        cost.add('matmul', x.size)  # here: what a branch is made of is traced once and kept
        return lax.platform_dependent(
            weights.astype(x.dtype), x, cpu=_sum_of_rows, default=_sum_over_map
        )


def _sum_over_map(weights: jax.Array, x: jax.Array) -> jax.Array:
    """`sum_hw weights x`, `[..., c]`; with h and w as one axis a TPU would copy all of x."""
    return contract('...hw,...hwc->...c', weights, x, count=None)


def _sum_of_rows(weights: jax.Array, x: jax.Array) -> jax.Array:
    """The same with h and w as one axis: on a CPU the gradient is a third faster so."""
    weights, x = (
        rearrange(weights, '... h w -> ... (h w)'),
        rearrange(x, '... h w c -> ... (h w) c'),
    )
    return contract('...n,...nc->...c', weights, x, count=None)


class _Mask(nn.Module):
    """One logit a position, `[..., h, w, c] -> [..., h, w]`, in float32 or float64.

    A product with a vector and no convolution: as one, the gradient of x would come out of it in
    another layout, and a TPU copy the whole tensor.
    """

    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = initializers.variance_scaling(2.0, 'fan_in', 'normal')
        kernel = self.param('kernel', init, (x.shape[-1], 1), self.param_dtype)
        bias = self.param('bias', initializers.zeros, (1,), self.param_dtype)
        logits = contract('...c,c->...', x, kernel[:, 0].astype(x.dtype), count='macs')
        return logits + bias[0].astype(logits.dtype)


class _Branch(nn.Module):
    """`relu(norm(x W1 + b1)) W2 + b2` with `hidden` features inside; None is one linear layer."""

    hidden: int | None
    norm_eps: float
    last_init: Initializer | None
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        if self.hidden is not None:
            x = Dense(self.hidden, param_dtype=self.param_dtype, name='reduce')(x)
            x = LayerNorm(epsilon=self.norm_eps, param_dtype=self.param_dtype, name='norm')(x)
            x = jax.nn.relu(x)
        return Dense(
            c,
            kernel_init=self.last_init or torch_kernel,
            bias_init=self.last_init,
            param_dtype=self.param_dtype,
            name='expand',
        )(x)


def _branch_names(theirs: str, ours: str) -> dict[ForeignName, TorchName]:
    """GCNet's names of one branch; its norm has shape [r, 1, 1]."""
    return {
        **pointwise({f'{theirs}.0': f'{ours}/reduce', f'{theirs}.3': f'{ours}/expand'}),
        f'{theirs}.1.*': (f'{ours}/norm/*', 'r 1 1 -> r'),
    }


def _timm_names(theirs: str, ours: str) -> dict[ForeignName, TorchName]:
    return {
        **pointwise({f'{theirs}.fc1': f'{ours}/reduce', f'{theirs}.fc2': f'{ours}/expand'}),
        f'{theirs}.norm.*': f'{ours}/norm/*',
    }


register_attention(
    'gc',
    GlobalContext,
    paper='GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond',
    arxiv='1904.11492',
    year=2019,
    family='positions',
    complexity='N C + C^2/r',
    identity_at_init=lambda module: module.zero_init and module.fusion == ('add',),
    placement='branch_but_first',
    variants={
        'authors': {},
        'authors_r4': {'reduction': 4},
        'authors_average': {'pooling': 'average'},
        'authors_multiply': {'fusion': ('multiply',)},
        'authors_both': {'fusion': ('add', 'multiply')},
        'simplified_non_local': {'transform': 'linear'},
        'timm': {'reduction': 8, 'fusion': ('multiply',), 'norm_eps': 1e-6},
    },
    torch_names={
        'authors': {
            **pointwise({'conv_mask': 'mask'}),
            **_branch_names('channel_add_conv', 'add'),
            **_branch_names('channel_mul_conv', 'multiply'),
        },
        'timm': {
            **pointwise({'conv_attn': 'mask'}),
            **_timm_names('mlp_add', 'add'),
            **_timm_names('mlp_scale', 'multiply'),
        },
        'simplified_non_local': pointwise({'conv_mask': 'mask', 'transform': 'add/expand'}),
    },
)
