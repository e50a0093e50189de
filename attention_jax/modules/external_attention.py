"""External attention: positions attend to a learned memory instead of to each other."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional import cost
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import activation
from attention_jax.modules.initializers import Initializer, kaiming_fan_out, torch_bias
from attention_jax.modules.layers import BatchNorm
from attention_jax.modules.maps import sow_map
from attention_jax.modules.positions import flatten_positions
from attention_jax.modules.registry import pointwise, register_attention


class ExternalAttention(nn.Module):
    """External attention: every position reads a memory of k units, in time linear in positions.

    With the n positions of x `[..., h, w, c]`::

        y = x Wi + bi                              [..., n, c]
        l = y Mk                                   [..., n, k]    Mk [c, k]
        S = softmax_n(l), A = S / (eps + sum_k S)  [..., n, k]    weighting: double
        A = softmax_k(l)                                          weighting: softmax
        y = norm(A Mv Wo)                          [..., n, c]    Mv [k, c]
        out = act(y + x)

    Without `projection` there are no Wi, bi, Wo and norm; `projection=False, residual=False,
    activation=None` is the bare core. The double normalisation takes its softmax over positions,
    so that each depends on the whole image, padding included; there bi is a constant of the softmax
    and has no gradient. Wi Mk and Mv Wo are multiplied first, as nothing stands between them.

    Source: Guo, Liu, Mu, Hu, "Beyond Self-attention: External Attention using Two Linear Layers for
    Visual Tasks", arXiv 2105.02358, eq. 5-7; defaults from the authors' code (MenghaoGuo/EANet
    model_torch.py, `External_attention`). There both memories are one storage until the model moves
    to a device: as trained, they start equal and part at once (`memory_tie='init'`); the paper
    speaks of two. Collections have the core alone, with independent memories and eps 0, which gives
    NaN at a position whose weights all underflow. One softmax over the memory is an article's
    suggestion; the paper reports that the scale of the features calls for both normalisations. Wi,
    Wo and the memories start normal of variance 2 / c, bi as PyTorch's; without projection the
    memories start N(0, 0.001^2), as in the collection.

    Attributes:
        memory_size: k.
        weighting: 'double' or 'softmax'.
        memory_tie: 'init', Mv starts as the transpose of Mk; 'always', it is that; 'none'.
        projection: Wi, bi, Wo and the norm.
        residual: adds x.
        activation: of the sum: 'relu', 'silu', 'gelu', 'tanh', 'identity' or None.
        epsilon: eps.
        norm_momentum: of the norm, in Flax's sense (1 - PyTorch's).
        norm_eps: of the norm.
        dtype: type of the computation; None is the input's. Logits and weights are float32.
        param_dtype: type of the parameters.
    """

    memory_size: int = 64
    weighting: str = 'double'
    memory_tie: str = 'init'
    projection: bool = True
    residual: bool = True
    activation: str | None = 'relu'
    epsilon: float = 1e-9
    norm_momentum: float = 0.9
    norm_eps: float = 1e-5
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Reads the memory at each position of x `[..., h, w, c]`; `train` is for the norm."""
        checks.feature_map(x)
        checks.at_least('memory_size', self.memory_size, 1)
        checks.choice('weighting', self.weighting, _WEIGHTINGS)
        checks.choice('memory_tie', self.memory_tie, ('init', 'always', 'none'))
        checks.at_least('epsilon', self.epsilon, 0)
        act = activation('identity' if self.activation is None else self.activation)
        c, k = x.shape[-1], self.memory_size
        x = x.astype(self.dtype or x.dtype)
        weights_of = functools.partial(_Weights, param_dtype=self.param_dtype)
        memory_init = initializers.normal(math.sqrt(2 / c) if self.projection else 0.001)

        key, bias = weights_of((c, k), memory_init, name='memory_key')()
        if self.memory_tie == 'always':
            value = key.T
        else:
            init = memory_init if self.memory_tie == 'none' else lambda *_: key.T
            value, _ = weights_of((k, c), init, name='memory_value')()
        if self.projection:
            # Nothing stands between a projection and its memory: their product takes the place of
            # both, so that no array of n by c numbers lies in between.
            inner, bias = weights_of((c, c), kaiming_fan_out, torch_bias(c), name='in_projection')()
            outer, _ = weights_of((c, c), kaiming_fan_out, name='out_projection')()
            key, bias, value = inner @ key, bias @ key, value @ outer
            cost.add('macs', 2 * x.size * c)

        weights = _normalized(_logits(x, key, bias), (-3, -2), self.weighting, self.epsilon)
        sow_map(self, lambda: flatten_positions(weights))
        y = functional.dense(weights.astype(x.dtype), value.astype(x.dtype))
        if self.projection:
            y = BatchNorm(
                momentum=self.norm_momentum,
                epsilon=self.norm_eps,
                param_dtype=self.param_dtype,
                name='norm',
            )(y, train=train)
        return act(y + x if self.residual else y)


class MultiHeadExternalAttention(nn.Module):
    """Multi-head external attention: all heads read one memory of k units.

    With the n positions of x `[..., h, w, c]`, f the expansion, H = heads f and e = c / heads::

        y = x Wi + bi                              [..., n, f c] as [..., H, n, e]
        l = y Mk + bk                              [..., H, n, k]    Mk [e, k], of all heads
        S = softmax_n(l), A = S / (eps + sum_k S)  [..., H, n, k]    weighting: double
        A = softmax_k(l)                                             weighting: softmax
        y = drop(A) Mv + bv                        [..., H, n, e]    Mv [k, e]
        out = drop(y Wo + bo)                      [..., n, c]       Wo [f c, c]

    No residual and no norm: the block around it has them. Under 'double' bi and bk are constants of
    a softmax over positions and have no gradient. The weights are f k heads / c times as large as
    x: where memory is short, wrap the module in `flax.linen.remat`. Under 'double' without dropout
    of the weights a TPU multiplies Wi Mk and Mv Wo first and does not keep the logits
    (`functional.read_memory`), and forward-mode differentiation raises a TypeError on any device.

    Source: Guo, Liu, Mu, Hu, "Beyond Self-attention: External Attention using Two Linear Layers for
    Visual Tasks", arXiv 2105.02358, section 3.3; defaults from the authors' code (MenghaoGuo/EANet
    multi_head_attention_torch.py, `Attention`, that of their EAMLP), whose arguments for a bias
    of the projections and a scale do nothing. Kernels start N(0, 0.02^2) and biases 0, as in EAMLP.

    Attributes:
        heads: heads before the expansion; they divide the channels.
        expansion: f.
        memory_size: k; None is 256 / expansion.
        weighting: 'double' or 'softmax'.
        attention_dropout_rate: share of the weights taken out in training.
        dropout_rate: share of the outputs taken out in training.
        epsilon: eps.
        dtype: type of the computation; None is the input's. Logits and weights are float32.
        param_dtype: type of the parameters.
    """

    heads: int = 8
    expansion: int = 4
    memory_size: int | None = None
    weighting: str = 'double'
    attention_dropout_rate: float = 0.0
    dropout_rate: float = 0.0
    epsilon: float = 1e-9
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Reads the memory at each position of x `[..., h, w, c]`, with every head.

        Training takes its dropout from the random stream 'dropout' where a rate is not 0.
        """
        checks.feature_map(x)
        checks.choice('weighting', self.weighting, _WEIGHTINGS)
        checks.at_least('epsilon', self.epsilon, 0)
        checks.rate('attention_dropout_rate', self.attention_dropout_rate)
        checks.rate('dropout_rate', self.dropout_rate)
        c = x.shape[-1]
        checks.divides('heads', self.heads, 'the channels', c)
        checks.at_least('expansion', self.expansion, 1)
        k = self.memory_size
        if k is None:
            checks.divides('expansion', self.expansion, 'the memory of all heads,', 256)
            k = 256 // self.expansion
        checks.at_least('memory_size', k, 1)
        x = x.astype(self.dtype or x.dtype)
        inside, e = self.expansion * c, c // self.heads
        shapes = {
            'in_projection': (c, inside),
            'memory_key': (e, k),
            'memory_value': (k, e),
            'out_projection': (inside, c),
        }
        init = (initializers.normal(0.02), initializers.zeros, self.param_dtype)
        layers = [_Weights(shape, *init, name=name)() for name, shape in shapes.items()]
        drop = functools.partial(nn.Dropout, deterministic=not train)
        weigh = functools.partial(_weights, weighting=self.weighting, epsilon=self.epsilon)
        sow_map(self, lambda: rearrange(weigh(x, layers), '... h w g k -> ... g (h w) k'))
        if self.weighting == 'softmax' or (train and self.attention_dropout_rate):
            weights = weigh(x, layers).astype(x.dtype)
            y = _read(drop(self.attention_dropout_rate)(weights), layers)
        else:
            y = lax.platform_dependent(
                x,
                layers,
                tpu=functools.partial(_joined, epsilon=self.epsilon),
                default=lambda x, layers: _read(weigh(x, layers).astype(x.dtype), layers),
            )
        return drop(self.dropout_rate)(y)


class _Weights(nn.Module):
    """The kernel of a linear layer and its bias (None without `bias_init`), not yet applied."""

    shape: tuple[int, int]
    kernel_init: Initializer
    bias_init: Initializer | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param('kernel', self.kernel_init, self.shape, self.param_dtype)
        if self.bias_init is None:
            return kernel, None
        return kernel, self.param('bias', self.bias_init, self.shape[1:], self.param_dtype)


Layer = tuple[jax.Array, jax.Array | None]  # kernel and bias
_WEIGHTINGS = ('double', 'softmax')


def _weights(x: jax.Array, layers: Sequence[Layer], *, weighting: str, epsilon: float) -> jax.Array:
    """The weights of all heads, `[..., h, w, g, k]`."""
    inner, key, _, _ = layers
    # Heads behind the positions, where they are: nothing is transposed.
    y = rearrange(_linear(x, inner), '... (g e) -> ... g e', e=key[0].shape[0])
    return _normalized(_logits(y, *key), (-4, -3), weighting, epsilon)


def _read(weights: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    """What the weights read, projected, `[..., h, w, c]`."""
    _, _, value, outer = layers
    return _linear(rearrange(_linear(weights, value), '... g e -> ... (g e)'), outer)


def _joined(x: jax.Array, layers: Sequence[Layer], *, epsilon: float) -> jax.Array:
    """Both with the projections multiplied into the memories: more products, far less to move."""
    (inner, _), (key, _), (value, value_bias), (outer, bias) = layers
    product = functools.partial(contract, count=None, precision='highest')
    inner = rearrange(inner, 'c (g e) -> c g e', e=key.shape[0])
    outer = rearrange(outer, '(g e) o -> g e o', e=key.shape[0])
    key, value = product('cge,ek->cgk', inner, key), product('ke,geo->gko', value, outer)
    bias = bias + product('e,geo->o', value_bias, outer)
    y = functional.read_memory(x.reshape(-1, *x.shape[-3:]), key, value, epsilon).reshape(x.shape)
    return y + expand_to(bias.astype(x.dtype), x)


def _linear(x: jax.Array, layer: Layer) -> jax.Array:
    kernel, bias = layer
    y = functional.dense(x, kernel.astype(x.dtype))
    return y + expand_to(bias.astype(x.dtype), x)


def _logits(x: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x key + bias`, `[..., k]`, in float32 or float64."""
    logits = contract('...c,ck->...k', x, key.astype(x.dtype), count='macs')
    return logits if bias is None else logits + expand_to(bias.astype(logits.dtype), logits)


def _normalized(
    logits: jax.Array, positions: tuple[int, int], weighting: str, epsilon: float
) -> jax.Array:
    """Weights of the memory's units; `positions` are the axes of height and width.

    The sum over units is divided by as it is, not in the logarithm: where it underflows, epsilon is
    part of the function.
    """
    if weighting == 'softmax':
        return jax.nn.softmax(logits)
    weights = jax.nn.softmax(logits, axis=positions)
    return weights / (epsilon + weights.sum(-1, keepdims=True))


_PAPER = {
    'paper': 'Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks',
    'arxiv': '2105.02358',
    'year': 2021,
    'family': 'positions',
    'complexity': 'N C (C + M)',
}
_CORE = {'projection': False, 'residual': False, 'activation': None, 'memory_tie': 'none'}

register_attention(
    'external_attention',
    ExternalAttention,
    **_PAPER,
    variants={
        'authors': {},
        'authors_tied': {'memory_tie': 'always'},
        'xmu': {**_CORE, 'epsilon': 0.0},
        'article': {**_CORE, 'weighting': 'softmax'},
    },
    torch_names={
        'authors': {
            **pointwise({'conv1': 'in_projection', 'conv2.0': 'out_projection'}),
            **pointwise({'linear_0': 'memory_key', 'linear_1': 'memory_value'}, spatial_dims=1),
            'conv2.1.*': 'norm/*',
        },
        'xmu': {'mk.*': 'memory_key/*', 'mv.*': 'memory_value/*'},
    },
)
register_attention(
    'multihead_external_attention',
    MultiHeadExternalAttention,
    **_PAPER,
    variants={'authors': {}, 'eamlp_7': {'heads': 4}},
    torch_names={
        'authors': {
            'trans_dims.*': 'in_projection/*',
            'linear_0.*': 'memory_key/*',
            'linear_1.*': 'memory_value/*',
            'proj.*': 'out_projection/*',
        }
    },
)
