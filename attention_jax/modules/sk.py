"""Selective kernels."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import ACTIVATIONS
from attention_jax.modules.layers import BatchNorm, Conv, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import Scheme, TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class SelectiveKernel(nn.Module):
    """Selective kernels: branches of different windows, weighed against each other per channel.

    In place of a 3x3 convolution with its norm and activation. With x `[..., h, w, c]`, o the
    features, M branches and r the hidden width::

        U_m = relu(norm(conv_m(x)))                    [..., h', w', o]
        z = act(norm(mean_hw(sum_m U_m) Wr))           [..., r]       act: ReLU
        l = z Ws                                       [..., M, o]    branch-major
        a = softmax(l) over the branches               [..., M, o]
        out = sum_m a_m U_m                            [..., h', w', o]

    Source: Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019, arXiv 1903.06586; defaults
    from the authors' Caffe graphs (implus/SKNet): two branches of 32 groups, the 5x5 one a 3x3 of
    dilation 2, r = max(o / 16, 32), no biases (their SKNet-101 has r = 16 where o = 256; their
    norms start with running variance 0 and have momentum 0.95). timm gives each branch a slice of
    the input, ungrouped, and rounds r to a multiple of 8. PyTorch copies have true 5x5 windows,
    biases, and a squeeze without norm or activation, which makes two stacked linear maps. The
    kernels start as the authors' do: branches normal of variance 2 / fan_in, Wr and Ws normal of
    standard deviation 0.01.

    Attributes:
        features: o; None is c.
        kernel_sizes: a window for each branch, odd, two branches at least.
        dilated: a window of k is a 3x3 of dilation (k - 1) / 2, and not a k x k.
        strides: of the branches.
        dilation: of the branches, times that of `dilated`.
        groups: of the branches' convolutions.
        reduction: divisor of o that gives r, rounded down.
        min_hidden: lower bound of r, unless `hidden` is given.
        hidden: r itself; wins over `reduction`.
        hidden_divisor: rounds `o / reduction` to the nearest multiple, never more than 10 % below
            it (timm: 8).
        split_input: branch m reads the m-th slice of the input channels.
        use_bias: biases of the branches' convolutions.
        squeeze_normalization: 'batch' or None, after Wr.
        squeeze_activation: 'relu', 'silu', 'gelu', 'tanh' or 'identity', after that norm.
        squeeze_bias: a bias with Wr.
        select_bias: a bias with Ws.
        dtype: type of the computation; None is the input's. The pool, z and a are float32.
        param_dtype: type of the parameters.
    """

    features: int | None = None
    kernel_sizes: tuple[int, ...] = (3, 5)
    dilated: bool = True
    strides: int = 1
    dilation: int = 1
    groups: int = 32
    reduction: int = 16
    min_hidden: int = 32
    hidden: int | None = None
    hidden_divisor: int | None = None
    split_input: bool = False
    use_bias: bool = False
    squeeze_normalization: str | None = 'batch'
    squeeze_activation: str = 'relu'
    squeeze_bias: bool = False
    select_bias: bool = False
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Convolves x `[..., h, w, c]` and weighs the results; `train` is for the norms.

        Raises:
            ValueError: one example in training, where the norm of z has one value per channel.
        """
        self._check(x)
        act = ACTIVATIONS[self.squeeze_activation]
        o, m = self.features or x.shape[-1], len(self.kernel_sizes)
        r = hidden_width(
            o,
            reduction=self.reduction,
            hidden=self.hidden,
            divisor=self.hidden_divisor,
            minimum=self.min_hidden,
            guard=True,
        )
        x = x.astype(self.dtype or x.dtype)
        conv = functools.partial(
            Conv,
            o,
            strides=self.strides,
            groups=self.groups,
            use_bias=self.use_bias,
            kernel_init=initializers.variance_scaling(2.0, 'fan_in', 'normal'),
            param_dtype=self.param_dtype,
        )
        norm = functools.partial(BatchNorm, param_dtype=self.param_dtype)
        dense = functools.partial(
            Dense, kernel_init=initializers.normal(0.01), param_dtype=self.param_dtype
        )

        inputs, branches = jnp.split(x, m, axis=-1) if self.split_input else [x] * m, []
        for i, (k, part) in enumerate(zip(self.kernel_sizes, inputs, strict=True)):
            window, spread = (3, (k - 1) // 2) if self.dilated else (k, 1)
            conv_k = functools.partial(
                conv, kernel_size=(window, window), dilation=self.dilation * spread
            )
            branches.append(_Branch(conv_k, norm, name=f'branch_{i}')(part, train=train))
        s = functional.branch_mean(branches)
        z = dense(r, use_bias=self.squeeze_bias, name='reduce')(s)
        if self.squeeze_normalization == 'batch':
            z = norm(name='reduce_norm')(z, train=train)
        logits = dense(m * o, use_bias=self.select_bias, name='select')(act(z))
        logits = rearrange(logits, '... (m o) -> ... m o', m=m)
        out, weights = functional.branch_softmax(branches, logits)
        sow_map(self, lambda: weights)
        return out

    def _check(self, x: jax.Array) -> None:
        checks.feature_map(x)
        checks.choice('squeeze_normalization', self.squeeze_normalization, (None, 'batch'))
        checks.choice('squeeze_activation', self.squeeze_activation, ACTIVATIONS)
        for name in ('features', 'strides', 'dilation', 'groups', 'min_hidden'):
            checks.at_least(name, getattr(self, name), 1)
        m, c = len(self.kernel_sizes), x.shape[-1]
        if m < 2:
            raise ValueError(
                f'kernel_sizes must name two branches or more, got {self.kernel_sizes}'
            )
        for k in self.kernel_sizes:
            checks.odd('kernel_sizes', k)
            if self.dilated and k == 1:
                raise ValueError('kernel_sizes 1 cannot be a dilated 3x3: use dilated=False')
        if self.split_input and c % m:
            raise ValueError(f'split_input needs channels that {m} branches divide, got {c}')
        inputs = c // m if self.split_input else c
        checks.divides('groups', self.groups, 'the input channels', inputs)
        checks.divides('groups', self.groups, 'the features', self.features or c)


class _Branch(nn.Module):
    """`relu(norm(conv(x)))`; the layers come with all but their names."""

    conv: Callable[..., Conv]
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return jax.nn.relu(self.norm(name='norm')(self.conv(name='conv')(x), train=train))


def _torch_names(module: SelectiveKernel) -> TorchNames:
    """Names in timm, and in PyTorch copies with a layer of their own for each branch."""

    def branches(theirs: str, conv: str, norm: str) -> Scheme:
        return {
            f'{theirs}.{{m}}.{conv}.*': 'branch_{m}/conv/*',
            f'{theirs}.{{m}}.{norm}.*': 'branch_{m}/norm/*',
        }

    numbers = range(len(module.kernel_sizes))
    separate: Scheme = {
        tuple(f'fcs.{m}.weight' for m in numbers): ('select/kernel', 'm o i 1 1 -> i (m o)'),
        tuple(f'fcs.{m}.bias' for m in numbers): ('select/bias', 'm o -> (m o)'),
    }
    if module.squeeze_normalization is None:
        separate |= pointwise({'fc': 'reduce'})
    else:
        separate |= {**pointwise({'fc.0': 'reduce'}), 'fc.1.*': 'reduce_norm/*'}
    return {
        'timm': {
            **branches('paths', 'conv', 'bn'),
            **pointwise({'attn.fc_reduce': 'reduce', 'attn.fc_select': 'select'}),
            'attn.bn.*': 'reduce_norm/*',
        },
        'pytorch': {**branches('convs', '0', '1'), **separate},
        'article': {**branches('convs', 'conv', 'bn'), **separate},
    }


_LINEAR_SQUEEZE = {
    'dilated': False,
    'use_bias': True,
    'squeeze_normalization': None,
    'squeeze_activation': 'identity',
    'squeeze_bias': True,
    'select_bias': True,
}

register_attention(
    'sk',
    SelectiveKernel,
    paper='Selective Kernel Networks',
    arxiv='1903.06586',
    year=2019,
    family='block',
    complexity='N C^2 k^2/g + C^2/r',
    replaces_convolution=True,
    placement='conv2',
    variants={
        'authors': {},
        'timm': {'groups': 1, 'split_input': True, 'min_hidden': 8, 'hidden_divisor': 8},
        'timm_skresnet': {
            'groups': 1,
            'split_input': True,
            'reduction': 8,
            'min_hidden': 16,
            'hidden_divisor': 16,
        },
        'timm_skresnext': {'hidden_divisor': 32},
        'select_bias': {'select_bias': True},
        'linear_squeeze': _LINEAR_SQUEEZE,
        'article': {**_LINEAR_SQUEEZE, 'kernel_sizes': (1, 3, 5, 7), 'groups': 1},
    },
    torch_names=_torch_names,
)
