"""Split attention."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import linen as nn

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.gating import rescale
from attention_jax.modules.initializers import kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv
from attention_jax.modules.maps import sow_map
from attention_jax.modules.registry import register_attention
from attention_jax.modules.widths import hidden_width


class SplitAttention(nn.Module):
    """Split attention: the splits of a grouped convolution weighed against each other.

    In place of a 3x3 convolution with its norm and activation. With x `[..., h, w, c]`, o the
    features, R the radix, K the groups (cardinality) and r the hidden width::

        y = relu(norm0(conv(x)))                   [..., h', w', R o]     K R groups
        U_s = channels s o ... (s + 1) o - 1 of y  [..., h', w', o]       radix-major
        z = relu(norm1(fc1(mean_hw sum_s U_s)))    [..., r]               K groups
        l = fc2(z)                                 [..., K, R, o / K]     cardinality-major
        a = softmax(l) over the splits             [..., R, o]            R = 1: sigmoid
        out = sum_s a_s U_s                        [..., h', w', o]

    The two orders of channels differ: only for K = 1 does l need no transposition. Each split reads
    its own slice of the input.

    Source: Zhang et al., "ResNeSt: Split-Attention Networks", CVPR workshops 2022, arXiv
    2004.08955; defaults from zhanghang1989/ResNeSt resnest/torch/models/splat.py `SplAtConv2d` with
    the arguments that the networks give it (the class alone has biases, no norm, and no padding).
    timm's `SplitAttn` rounds the hidden width to a multiple of 8 and pads k // 2 whatever the
    dilation. Its rectified and deformable convolutions are not offered: no released network uses
    them. Kernels start as in that network, normal of variance 2 / (window * outputs) over the
    outputs of all groups; biases as PyTorch's do.

    Attributes:
        features: o; None is c.
        kernel_size: side k of the convolution's window.
        strides: of the convolution.
        padding: zeros around x; None is `dilation * (k - 1) / 2`.
        dilation: of the convolution.
        groups: K, the cardinality.
        radix: R, the splits of each group.
        reduction: divisor of `c R` that gives r, rounded down.
        hidden: r itself; wins over `reduction`.
        min_hidden: lower bound of r, unless `hidden` is given.
        hidden_divisor: rounds `c R / reduction` to the nearest multiple, never more than 10 % below
            it (timm: 8).
        use_bias: bias of the convolution; fc1 and fc2 always have theirs.
        normalization: 'batch', or None for neither norm.
        dtype: type of the computation; None is the input's. The pool, r and the weights are
            float32.
        param_dtype: type of the parameters.
    """

    features: int | None = None
    kernel_size: int = 3
    strides: int = 1
    padding: int | None = None
    dilation: int = 1
    groups: int = 1
    radix: int = 2
    reduction: int = 4
    hidden: int | None = None
    min_hidden: int = 32
    hidden_divisor: int | None = None
    use_bias: bool = False
    normalization: str | None = 'batch'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Convolves x `[..., h, w, c]` and weighs the splits; `train` is for the norms.

        Raises:
            ValueError: one example in training, where norm1 has one value per channel.
        """
        self._check(x)
        o, radix, groups = self.features or x.shape[-1], self.radix, self.groups
        r = hidden_width(
            x.shape[-1] * radix,
            reduction=self.reduction,
            hidden=self.hidden,
            divisor=self.hidden_divisor,
            minimum=self.min_hidden,
            guard=True,
        )
        checks.divides('groups', groups, 'the hidden width', r)
        conv = functools.partial(Conv, kernel_init=kaiming_fan_out, param_dtype=self.param_dtype)

        def norm(y: jax.Array, name: str) -> jax.Array:
            if self.normalization is None:
                return y
            return BatchNorm(param_dtype=self.param_dtype, name=name)(y, train=train)

        y = conv(
            radix * o,
            (self.kernel_size, self.kernel_size),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=groups * radix,
            use_bias=self.use_bias,
            name='conv',
        )(x.astype(self.dtype or x.dtype))
        y = jax.nn.relu(norm(y, 'norm0'))
        splits = jnp.split(y, radix, axis=-1)
        # Of all splits at once: a TPU would write them out before it takes the mean of each.
        s = reduce(functional.spatial_mean(y), '... (s o) -> ... 1 1 o', 'sum', s=radix)
        z = jax.nn.relu(norm(conv(r, (1, 1), groups=groups, name='fc1')(s), 'norm1'))
        logits = conv(radix * o, (1, 1), groups=groups, name='fc2')(z)
        logits = rearrange(logits, '... 1 1 (k s o) -> ... s (k o)', k=groups, s=radix)
        if radix == 1:
            weights = jax.nn.sigmoid(logits)
            out = rescale(splits[0], weights[..., 0, :])
        else:
            out, weights = functional.branch_softmax(splits, logits)
        sow_map(self, lambda: weights)
        return out

    def _check(self, x: jax.Array) -> None:
        checks.feature_map(x)
        checks.choice('normalization', self.normalization, (None, 'batch'))
        checks.at_least('features', self.features, 1)
        for name in ('kernel_size', 'strides', 'dilation', 'groups', 'radix', 'min_hidden'):
            checks.at_least(name, getattr(self, name), 1)
        checks.at_least('padding', self.padding, 0)
        if self.padding is None:
            checks.odd('kernel_size', self.kernel_size)
        parts = self.groups * self.radix
        if x.shape[-1] % parts:
            raise ValueError(
                f'groups {self.groups} times radix {self.radix} is {parts}, which must divide the '
                f'channels {x.shape[-1]}'
            )
        checks.divides('groups', self.groups, 'the features', self.features or x.shape[-1])


register_attention(
    'split_attention',
    SplitAttention,
    paper='ResNeSt: Split-Attention Networks',
    arxiv='2004.08955',
    year=2020,
    family='block',
    complexity='N C^2 k^2/g + R^2 C^2/r',
    replaces_convolution=True,
    placement='conv2',
    variants={
        'authors': {},
        'authors_radix1': {'radix': 1},
        'authors_radix4': {'radix': 4},
        'authors_cardinality2': {'groups': 2},
        'authors_class': {'use_bias': True, 'normalization': None},
        'timm': {'hidden_divisor': 8},
    },
    torch_names={
        'authors': {
            'conv.*': 'conv/*',
            'bn0.*': 'norm0/*',
            'fc1.*': 'fc1/*',
            'bn1.*': 'norm1/*',
            'fc2.*': 'fc2/*',
        }
    },
)
