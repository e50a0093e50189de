"""Global second-order pooling."""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional import covariance
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import rescale
from attention_jax.modules.initializers import kaiming_fan_out, torch_bias
from attention_jax.modules.layers import BatchNorm, Conv, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.positions import flatten_positions
from attention_jax.modules.registry import Scheme, pointwise, register_attention


class GlobalSecondOrderPooling(nn.Module):
    """Global second-order pooling: gates from the covariances of channels, or of positions.

    With x `[..., h, w, c]` before any activation, d the hidden width, s the strides, n the cells of
    the grid and e the expansion::

        channel:
        z = relu(norm(relu(x)[::s, ::s] Wr + br))              [..., h', w', d]
        S = covariance of z over positions, each row normed    [..., d, d]
        v[i] = act(S[i] Kc[i] + bc[i])                         [..., d, e]      act: none
        A = sigmoid(v We + be)                                 [..., c]         v flat, i first
        position:
        z = norm(relu(x) Wp + bp), averaged over a grid        [..., n, d]
        S = covariance of the cells, each row normed           [..., n, n]
        v[i] = relu(S[i] Kp[i] + bp2[i])                       [..., n, e]
        P = sigmoid(v Wq + bq), averaged back                  [..., h, w]
        a = x A;  p = relu(x P)
        out = a, p, a + p, max(a, p), or norm(conv(a) + conv(p))

    Source: Gao, Xie, Wang, Li, "Global Second-order Pooling Convolutional Networks", CVPR 2019,
    arXiv 1811.12006; defaults from ZilinGao/Global-Second-order-Pooling-Convolutional-Networks
    torchvision/models/resnet.py, `Bottleneck`. As there, the cells' covariance is centred as if it
    had n channels and not d: with m the mean of a cell over the channels and Cov the true
    covariance it is `S = d / n (Cov + (1 - d / n) m m^T)`, which need not be positive. 'channels'
    centres it truly. Secondary sources report a leaky ReLU in the channel branch for the paper. The
    fusion's convolutions are (k, 1) windows. Kernels start as the authors' do (He et al., fan-out),
    biases as PyTorch's.

    Attributes:
        hidden: d, at any width of the input.
        mode: 'channel', 'position', 'fusion_avg' (a sum), 'fusion_max' or 'fusion_concat'.
        strides: s, of the channel branch's reduction (the authors: 2 in the first stage).
        grid: cells along height and width.
        expansion: e, numbers that each row of S gives.
        groups: of the concat convolutions; None is c // 64.
        kernel_size: k of them, odd; None is `2 int(log2(32 / groups)) + 5`.
        channel_activation: 'identity' or 'leaky_relu' (slope 0.1).
        position_centering: 'grid' as released, or 'channels'.
        dtype: type of the computation; None is the input's. Covariances (at the highest matmul
            precision) and what follows them are float32.
        param_dtype: type of the parameters.
    """

    hidden: int = 128
    mode: str = 'channel'
    strides: int = 1
    grid: tuple[int, int] = (8, 8)
    expansion: int = 4
    groups: int | None = None
    kernel_size: int | None = None
    channel_activation: str = 'identity'
    position_centering: str = 'grid'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Gates x `[..., h, w, c]`, taken before any activation; `train` is for the norms."""
        self._check(x)
        x = x.astype(self.dtype or x.dtype)
        both = self.mode.startswith('fusion')
        if self.mode != 'position':
            gates = self._channel(x, train)
            sow_map(self, lambda: gates, 'channel' if both else 'map')
            a = rescale(x, gates)
        if self.mode != 'channel':
            plane = self._position(x, train)
            sow_map(self, lambda: plane, 'position' if both else 'map')
            p = jax.nn.relu(rescale(x, plane[..., None]))

        match self.mode:
            case 'channel':
                return a
            case 'position':
                return p
            case 'fusion_avg':
                return a + p
            case 'fusion_max':
                return jnp.maximum(a, p)
        return self._concat(a, p, train)

    def _channel(self, x: jax.Array, train: bool) -> jax.Array:
        """A, `[..., c]`."""
        s = self.strides
        z = jax.nn.relu(self._reduce(x[..., ::s, ::s, :], 'channel', train))
        v = self._rows(covariance.covariance(z), 'channel', train)
        return self._expand(_ACTIVATIONS[self.channel_activation](v), x.shape[-1], 'channel')

    def _position(self, x: jax.Array, train: bool) -> jax.Array:
        """P, `[..., h, w]`."""
        z = self._reduce(x, 'position', train)
        cells = functional.adaptive_avg_pool(z, self.grid)
        n, d = math.prod(self.grid), self.hidden
        # Cells are now the variables, channels the observations.
        cells = rearrange(flatten_positions(cells), '... n d -> ... 1 d n')
        s = covariance.covariance(cells)
        if self.position_centering == 'grid':
            mean = functional.spatial_mean(cells)
            s = d / n * (s + (1 - d / n) * mean[..., :, None] * mean[..., None, :])
        v = jax.nn.relu(self._rows(s, 'position', train))
        gates = self._expand(v, n, 'position')
        gates = rearrange(gates, '... (h w) -> ... h w 1', h=self.grid[0])
        return functional.adaptive_avg_pool(gates, x.shape[-3:-1])[..., 0]

    def _concat(self, a: jax.Array, p: jax.Array, train: bool) -> jax.Array:
        """`norm(conv(a) + conv(p))`."""
        c = a.shape[-1]
        if self.groups is None and c < 64:
            raise ValueError(
                f"groups None makes groups of 64 channels in mode 'fusion_concat', but x has "
                f'{c}: give groups'
            )
        groups, window = c // 64 if self.groups is None else self.groups, self.kernel_size
        checks.divides('groups', groups, 'the channels', c)
        if window is None:
            window = 2 * int(math.log2(32 / groups)) + 5
        checks.odd('kernel_size', window)
        init = {'kernel_init': kaiming_fan_out, 'param_dtype': self.param_dtype}
        conv = functools.partial(Conv, c, (window, 1), groups=groups, **init)
        y = conv(name='concat_channel')(a) + conv(name='concat_position')(p)
        return self._norm('concat_norm')(y, train=train)

    def _reduce(self, x: jax.Array, branch: str, train: bool) -> jax.Array:
        z = self._dense(self.hidden, f'{branch}_reduce')(jax.nn.relu(x))
        return self._norm(f'{branch}_reduce_norm')(z, train=train)

    def _rows(self, s: jax.Array, branch: str, train: bool) -> jax.Array:
        """`[..., d, d]` -> `[..., d, e]`: each row normed, then e numbers from it.

        The norm has its channels last. S is symmetric, so that its columns are its rows: normed
        over them it is the transpose of what is wanted.
        """
        s = self._norm(f'{branch}_row_norm')(s, train=train)
        return _RowConv(self.expansion, self.param_dtype, name=f'{branch}_row_conv')(s)

    def _expand(self, v: jax.Array, features: int, branch: str) -> jax.Array:
        v = rearrange(v, '... i m -> ... (i m)')
        return jax.nn.sigmoid(self._dense(features, f'{branch}_expand')(v))

    def _dense(self, features: int, name: str) -> Dense:
        types = {'param_dtype': self.param_dtype}
        return Dense(features, kernel_init=kaiming_fan_out, **types, name=name)

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(param_dtype=self.param_dtype, name=name)

    def _check(self, x: jax.Array) -> None:
        checks.feature_map(x)
        checks.choice('mode', self.mode, _MODES)
        checks.choice('channel_activation', self.channel_activation, _ACTIVATIONS)
        checks.choice('position_centering', self.position_centering, ('grid', 'channels'))
        for name in ('hidden', 'strides', 'expansion'):
            checks.at_least(name, getattr(self, name), 1)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f'grid must be two positive numbers of cells, got {self.grid}')


class _RowConv(nn.Module):
    """`v[i, m] = sum_j s[j, i] kernel[i, j, m] + bias[i, m]`, a kernel for each row i."""

    features: int
    param_dtype: Dtype

    @nn.compact
    def __call__(self, s: jax.Array) -> jax.Array:
        d, e = s.shape[-1], self.features
        init = initializers.normal(math.sqrt(2 / e) / d)  # He et al. with PyTorch's fan-out, e d^2
        kernel = self.param('kernel', init, (d, d, e), self.param_dtype).astype(s.dtype)
        bias = self.param('bias', torch_bias(d), (d, e), self.param_dtype).astype(s.dtype)
        v = contract('...ji,ijm->...im', s, kernel, count='macs')
        return v + expand_to(bias, v)


_MODES = ('channel', 'position', 'fusion_avg', 'fusion_max', 'fusion_concat')
_ACTIVATIONS = {
    'identity': lambda v: v,
    'leaky_relu': functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
}


def _branch_names(theirs: str, rows: str, ours: str) -> Scheme:
    return {
        **pointwise(
            {
                f'conv_for_DR{theirs}': f'{ours}_reduce',
                f'fc_adapt_channels{rows}': f'{ours}_expand',
            }
        ),
        f'bn_for_DR{theirs}.*': f'{ours}_reduce_norm/*',
        f'row_bn{rows}.*': f'{ours}_row_norm/*',
        f'row_conv_group{rows}.weight': (f'{ours}_row_conv/kernel', '(i m) 1 j 1 -> i j m'),
        f'row_conv_group{rows}.bias': (f'{ours}_row_conv/bias', '(i m) -> i m'),
    }


register_attention(
    'gsop',
    GlobalSecondOrderPooling,
    paper='Global Second-order Pooling Convolutional Networks',
    arxiv='1811.12006',
    year=2019,
    family='mixed',
    complexity='N d (C + d) + d C',
    placement='last_block',
    variants={
        'authors': {},
        'authors_stage1': {'strides': 2},
        'authors_position': {'mode': 'position'},
        'authors_fusion_avg': {'mode': 'fusion_avg'},
        'authors_fusion_max': {'mode': 'fusion_max'},
        'authors_fusion_concat': {'mode': 'fusion_concat'},
        'leaky_relu': {'channel_activation': 'leaky_relu'},
        'true_covariance': {'mode': 'position', 'position_centering': 'channels'},
    },
    torch_names={
        'authors': {
            **_branch_names('', '', 'channel'),
            **_branch_names('_spatial', '_for_spatial', 'position'),
            'dilate_conv_for_concat1.*': 'concat_channel/*',
            'dilate_conv_for_concat2.*': 'concat_position/*',
            'bn_for_concat.*': 'concat_norm/*',
        }
    },
)
