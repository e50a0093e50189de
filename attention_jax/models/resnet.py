"""One residual network: stem, stages of blocks, head. What differs between networks is data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.models import placement as placements
from attention_jax.models.attach import attach, run_block
from attention_jax.modules.initializers import Initializer, kaiming_fan_out, torch_kernel
from attention_jax.modules.layers import BatchNorm, Conv, Dense, StochasticDepth
from attention_jax.modules.registry import attention_entry, create_attention, field_names

_kaiming_fan_in = initializers.variance_scaling(2.0, 'fan_in', 'normal')
_ACTIVATIONS = {'relu': jax.nn.relu, 'silu': jax.nn.silu}

EXPANSION = {'basic': 1, 'bottleneck': 4}


@dataclasses.dataclass(frozen=True)
class Initialization:
    """Initialisers of a network.

    Attributes:
        conv: of convolutions.
        shortcut: of a shortcut's convolution.
        head: of the classifier.
        head_bias: of its bias; None is PyTorch's default.
        by_group: the variance of a grouped convolution is that of one group.
    """

    conv: Initializer = kaiming_fan_out
    shortcut: Initializer = kaiming_fan_out
    head: Initializer = torch_kernel
    head_bias: Initializer | None = None
    by_group: bool = False


INITIALIZATIONS = {
    'torchvision': Initialization(),
    # akamaster/pytorch_resnet_cifar10
    'cifar': Initialization(_kaiming_fan_in, _kaiming_fan_in, _kaiming_fan_in),
    # Jongchan/attention-module: goes by name, and a shortcut's names hold no 'conv'
    'cbam': Initialization(
        shortcut=torch_kernel, head=_kaiming_fan_in, head_bias=initializers.zeros
    ),
    # timm's byobnet.py
    'byob': Initialization(
        head=initializers.normal(0.01), head_bias=initializers.zeros, by_group=True
    ),
    # KaiyuYue/cgnl-network.pytorch
    'cgnl': Initialization(head=kaiming_fan_out),
    # facebookresearch/video-nonlocal-net
    'non_local': Initialization(head=initializers.normal(0.01), head_bias=initializers.zeros),
}


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv 1512.03385) with any mechanism at any place.

    Attributes:
        depths: number of blocks of each stage.
        widths: planes of each stage; a bottleneck puts out four times as many channels.
        block: 'basic' (two 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
        stem: '7x7' (stride 2, then a pool), 'deep' (three 3x3 of `stem_widths`, then the pool;
            ResNet-C, -D and -T) or 'cifar' (one 3x3, no pool).
        stem_widths: channels of the stem's convolutions: one, or three for 'deep'.
        stem_pool: 'max' (3x3, stride 2, one pixel of padding), 'max_ceil' (no padding, the last
            window may hang over; Caffe) or 'none' (the last convolution of 'deep' has stride 2).
        strides: stride of each stage; None is 1, then 2.
        stride_in: the strided convolution of a bottleneck: 'conv2' (its 3x3; v1.5, most released
            code) or 'conv1' (its first 1x1; v1, He et al.).
        shortcut: 'conv' (1x1 and norm), 'avg' (2x2 average pool first; ResNet-D), 'conv3' (3x3
            where it is strided; SENet-154) or 'pad' (every second pixel, zeros for the new
            channels; option A of the CIFAR networks).
        cardinality: groups of a bottleneck's 3x3 (ResNeXt).
        base_width: width of one group at 64 planes.
        group_width: channels of each group instead, the same in all stages; wins over
            `cardinality`, and the inner width is then the planes.
        first_divisor: divides the width of a bottleneck's first 1x1 (SENet-154: 2).
        conv2_pool: where a 3x3 average pool takes the stride of a bottleneck's second convolution:
            'before' or 'after' it; None: nowhere.
        activation: 'relu' or 'silu'.
        features: width of a 1x1 convolution with norm and activation before the pool; 0: none.
        pool: what makes a vector of the last map: 'mean', or 'isqrt_cov' (GSoP-Net2).
        pool_args: arguments of the latter.
        attention: registry name of a mechanism, or None.
        placement: where it sits, a text of `models.placement`; None is its authors' choice.
        attention_args: its arguments: a mapping, or a sequence of one mapping a stage.
        identity_init: a mechanism that does not start as the identity is made to
            (`models.attach`), unless it stands in the place of a convolution.
        num_classes: width of the head; 0 drops it and returns the pooled features.
        zero_init_last: the last norm of each branch starts with scale 0.
        initialization: key of `INITIALIZATIONS`.
        dropout_rate: of the pooled features in training.
        drop_path_rate: probability that the last block's branch is dropped in training, for each
            example (stochastic depth); it rises linearly from 0 over the blocks.
        spatial_dims: 3 takes videos `[b, t, h, w, c]`: frames are convolved one by one, a mechanism
            that has `spatial_dims` sees time as a third axis, and a max pool halves the frames
            after the first stage (the C2D networks of Non-local).
        dtype: type of the computation; None is the input's. Norm statistics are float32.
        param_dtype: type of the parameters.
    """

    depths: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    block: str = 'bottleneck'
    stem: str = '7x7'
    stem_widths: Sequence[int] = (64,)
    stem_pool: str = 'max'
    strides: Sequence[int] | None = None
    stride_in: str = 'conv2'
    shortcut: str = 'conv'
    cardinality: int = 1
    base_width: int = 64
    group_width: int | None = None
    first_divisor: int = 1
    conv2_pool: str | None = None
    activation: str = 'relu'
    features: int = 0
    pool: str = 'mean'
    pool_args: Mapping[str, Any] | None = None
    attention: str | None = None
    placement: str | None = None
    attention_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    identity_init: bool = False
    num_classes: int = 1000
    zero_init_last: bool = False
    initialization: str = 'torchvision'
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    spatial_dims: int = 2
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Refuses arguments that no input could make right."""
        super().__post_init__()
        checks.choice('block', self.block, EXPANSION)
        checks.choice('stem', self.stem, ('7x7', 'deep', 'cifar'))
        checks.choice('stem_pool', self.stem_pool, ('max', 'max_ceil', 'none'))
        checks.choice('stride_in', self.stride_in, ('conv1', 'conv2'))
        checks.choice('shortcut', self.shortcut, ('conv', 'avg', 'conv3', 'pad'))
        checks.choice('conv2_pool', self.conv2_pool, (None, 'before', 'after'))
        checks.choice('activation', self.activation, _ACTIVATIONS)
        checks.choice('pool', self.pool, ('mean', 'isqrt_cov'))
        checks.choice('spatial_dims', self.spatial_dims, (2, 3))
        checks.choice('initialization', self.initialization, INITIALIZATIONS)
        checks.at_least('num_classes', self.num_classes, 0)
        checks.rate('dropout_rate', self.dropout_rate)
        checks.rate('drop_path_rate', self.drop_path_rate)
        for name, entries in (('widths', self.widths), ('strides', self.stage_strides())):
            if len(self.depths) != len(entries):
                raise ValueError(
                    f'{name} must have one entry a stage: {len(self.depths)} stages, '
                    f'got {tuple(entries)}'
                )
        if self.pool_args and self.pool == 'mean':
            raise ValueError(f"pool_args need pool 'isqrt_cov', got pool 'mean', {self.pool_args}")
        if self.attention is None and self.attention_args:
            raise ValueError('attention_args need attention, got attention=None')
        self.stage_arguments()
        self.resolved_placement()

    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each stage's first block."""
        if self.strides is None:
            return (1,) + (2,) * (len(self.depths) - 1)
        return tuple(self.strides)

    def stage_arguments(self) -> tuple[Mapping[str, Any], ...]:
        """The mechanism's arguments in each stage."""
        return placements.stage_arguments(self.attention_args, len(self.depths))

    def resolved_placement(self) -> placements.Placement | None:
        """The placement with its blocks, checked against the mechanism; None without one."""
        return placements.resolve(self.attention, self.placement, self.depths, self.block)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
            x: `[b, h, w, c]`, or `[b, t, h, w, c]`; normalised, any number of channels.
            train: uses the batch's statistics and dropout.
            return_stages: also returns the stages' outputs by name.

        Returns:
            Logits `[b, num_classes]`, or pooled features `[b, c]` without a head; with
            `return_stages` a pair of these and a dict: `stem`, `stage1`... and `features` if there
            are any `[b, h', w', c']`, and `pre_logits` `[b, c]`.

        Raises:
            ValueError: an image smaller than the network's stride, or what the mechanism refuses.
        """
        self._check_input(x)
        init = INITIALIZATIONS[self.initialization]
        types = {'param_dtype': self.param_dtype}
        placement = self.resolved_placement()
        block = functools.partial(
            Block,
            kind=self.block,
            stride_in=self.stride_in,
            shortcut=self.shortcut,
            cardinality=self.cardinality,
            base_width=self.base_width,
            group_width=self.group_width,
            first_divisor=self.first_divisor,
            conv2_pool=self.conv2_pool,
            activation=self.activation,
            identity_init=self.identity_init,
            zero_init_last=self.zero_init_last,
            initialization=init,
            **types,
        )
        builders = self._attention_builders()

        x = x.astype(self.dtype or x.dtype)
        x = self._stem(
            x, builders[0] if placement and placement.where == 'pre_conv' else None, train=train
        )
        stages = {'stem': x}
        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist())
        for s, (depth, planes) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                this = functools.partial(
                    block,
                    planes=planes,
                    strides=self.stage_strides()[s] if b == 0 else 1,
                    drop_path_rate=next(rates),
                )
                x = run_block(
                    self, this, x, s, b, placement=placement, build=builders[s], train=train
                )
            if s == 0 and self.spatial_dims == 3:
                x = functional.max_pool(x, (2, 1, 1), strides=(2, 1, 1), ceil_mode=True)
            stages[f'stage{s + 1}'] = x

        if self.features:
            x = Conv(
                self.features,
                (1, 1),
                use_bias=False,
                kernel_init=init.conv,
                name='features_conv',
                **types,
            )(x)
            x = BatchNorm(name='features_norm', **types)(x, train=train)
            x = stages['features'] = _ACTIVATIONS[self.activation](x)
        x = self._pool(x, train=train)
        stages['pre_logits'] = x
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = Dense(
                self.num_classes,
                kernel_init=init.head,
                bias_init=init.head_bias,
                name='head',
                **types,
            )(x)
        return (x, stages) if return_stages else x

    def _attention_builders(self) -> list[Callable[..., nn.Module] | None]:
        """For each stage what builds the mechanism, given a name; None without one."""
        if self.attention is None:
            return [None] * len(self.depths)
        common = {'param_dtype': self.param_dtype}
        allowed = field_names(attention_entry(self.attention).cls)
        if self.spatial_dims == 3 and 'spatial_dims' in allowed:
            common['spatial_dims'] = 3
        return [
            functools.partial(create_attention, self.attention, **{**common, **arguments})
            for arguments in self.stage_arguments()
        ]

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[..., h, w, c] -> [b, c']`."""
        if self.pool == 'isqrt_cov':
            x = create_attention(
                'isqrt_cov',
                **{'param_dtype': self.param_dtype, **(self.pool_args or {})},
                name='pool',
            )(x, train=train)
        else:
            x = functional.spatial_mean(x).astype(x.dtype)
        return x.mean(axis=1) if self.spatial_dims == 3 else x

    def _check_input(self, x: jax.Array) -> None:
        checks.feature_map(x)
        if self.spatial_dims == 3 and x.ndim != 5:
            raise ValueError(f'x must be [b, t, h, w, c] with spatial_dims=3, got shape {x.shape}')
        stride = (1 if self.stem == 'cifar' else 4) * math.prod(self.stage_strides())
        checks.covers_stride(x, stride)

    def _stem(
        self, x: jax.Array, attention: Callable[..., nn.Module] | None, *, train: bool
    ) -> jax.Array:
        windows = {'7x7': (7,), 'deep': (3, 3, 3), 'cifar': (3,)}[self.stem]
        if len(self.stem_widths) != len(windows):
            raise ValueError(
                f'stem_widths must have {len(windows)} entries for stem {self.stem!r}, '
                f'got {tuple(self.stem_widths)}'
            )
        strided = () if self.stem == 'cifar' else (1,)
        if self.stem == 'deep' and self.stem_pool == 'none':
            strided = (1, len(windows))
        for i, (window, width) in enumerate(zip(windows, self.stem_widths, strict=True), 1):
            if attention:
                x = attach(
                    self,
                    attention,
                    f'stem_attention{i}',
                    x,
                    train=train,
                    identity_init=self.identity_init,
                )
            x = Conv(
                width,
                (window, window),
                strides=2 if i in strided else 1,
                use_bias=False,
                kernel_init=INITIALIZATIONS[self.initialization].conv,
                param_dtype=self.param_dtype,
                name=f'stem_conv{i}',
            )(x)
            x = BatchNorm(param_dtype=self.param_dtype, name=f'stem_norm{i}')(x, train=train)
            x = _ACTIVATIONS[self.activation](x)
        if self.stem == 'cifar' or self.stem_pool == 'none':
            return x
        if self.stem_pool == 'max_ceil':
            return functional.max_pool(x, 3, strides=2, ceil_mode=True)
        return functional.max_pool(x, 3, strides=2, padding=1)


class Block(nn.Module):
    """A residual block: `relu(branch(x) + shortcut(x))`.

    Attributes:
        planes: width of the stage.
        kind: 'basic' or 'bottleneck'.
        strides: stride of the block.
        stride_in: the bottleneck's strided convolution, 'conv1' or 'conv2'.
        shortcut: 'conv', 'avg', 'conv3' or 'pad', used where the stride or the width changes.
        cardinality: groups of the bottleneck's 3x3.
        base_width: width of one group at 64 planes.
        group_width: channels of each group instead.
        first_divisor: divides the width of the bottleneck's first 1x1.
        conv2_pool: 'before' or 'after': a 3x3 average pool takes the second convolution's stride.
        activation: 'relu' or 'silu'.
        attention: builds the mechanism, given a name (and features and strides where it replaces a
            convolution).
        where: the place of it in this block, a key of `models.placement.WHERE`, or None.
        identity_init: the mechanism starts as the identity.
        drop_path_rate: probability that the branch is dropped in training.
        zero_init_last: the last norm starts with scale 0.
        initialization: initialisers.
        param_dtype: type of the parameters.
    """

    planes: int
    kind: str
    strides: int
    stride_in: str
    shortcut: str
    cardinality: int
    base_width: int
    group_width: int | None
    first_divisor: int
    conv2_pool: str | None
    activation: str
    attention: Callable[..., nn.Module] | None
    where: str | None
    identity_init: bool
    drop_path_rate: float
    zero_init_last: bool
    initialization: Initialization
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the block to `[..., h, w, c]`."""
        features = self.planes * EXPANSION[self.kind]
        act = _ACTIVATIONS[self.activation]
        layers = self._layers(features)

        def attend(y: jax.Array, name: str = 'attention') -> jax.Array:
            return attach(
                self, self.attention, name, y, train=train, identity_init=self.identity_init
            )

        y = x
        for i, (width, window, strides, groups) in enumerate(layers, 1):
            last = i == len(layers)
            pool = self.conv2_pool if i == 2 and strides > 1 else None
            if pool == 'before':
                y = functional.avg_pool(y, 3, strides=strides, padding=1)
            if self.where == f'conv{i}':  # it brings its own norm and activation
                y = self.attention(name=f'conv{i}', features=width, strides=1 if pool else strides)(
                    y, train=train
                )
            else:
                if self.where == 'pre_conv':
                    y = attend(y, f'attention{i}')
                y = self._conv(width, window, 1 if pool else strides, groups, name=f'conv{i}')(y)
                if self.where == 'conv2_pre_norm' and i == 2:
                    y = attend(y)
                y = self._norm(f'norm{i}', zero=last and self.zero_init_last)(y, train=train)
                y = y if last else act(y)
            if pool == 'after':
                y = functional.avg_pool(y, 3, strides=strides, padding=1)
            if self.where == 'mid' and i == 2:
                y = attend(y)
        if self.where == 'branch_after_relu':
            y = act(y)
        if self.where in ('branch', 'branch_after_relu'):
            y = attend(y)
        y = StochasticDepth(self.drop_path_rate)(y, train=train)
        return act(y + self._shortcut(x, features, train=train))

    def _layers(self, features: int) -> list[tuple[int, int, int, int]]:
        """Width, window, stride and groups of each convolution."""
        if self.kind == 'basic':
            return [(self.planes, 3, self.strides, 1), (self.planes, 3, 1, 1)]
        if self.group_width:
            inner, groups = self.planes, self.planes // self.group_width
        else:
            inner, groups = self.planes * self.base_width // 64, self.cardinality
            inner *= groups
        first, second = (self.strides, 1) if self.stride_in == 'conv1' else (1, self.strides)
        return [
            (inner // self.first_divisor, 1, first, 1),
            (inner, 3, second, groups),
            (features, 1, 1, 1),
        ]

    def _shortcut(self, x: jax.Array, features: int, *, train: bool) -> jax.Array:
        if self.strides == 1 and x.shape[-1] == features:
            return x
        if self.shortcut == 'pad':
            x = x[..., :: self.strides, :: self.strides, :]
            new = features - x.shape[-1]
            return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((new // 2, new - new // 2),))
        strides = self.strides
        if self.shortcut == 'avg' and strides > 1:
            x = functional.avg_pool(
                x, strides, strides=strides, ceil_mode=True, count_padding=False
            )
            strides = 1
        if self.where == 'pre_conv':
            x = attach(
                self,
                self.attention,
                'shortcut_attention',
                x,
                train=train,
                identity_init=self.identity_init,
            )
        window = 3 if self.shortcut == 'conv3' and strides > 1 else 1
        x = self._conv(features, window, strides, 1, name='shortcut_conv')(x)
        return self._norm('shortcut_norm')(x, train=train)

    def _conv(self, features: int, window: int, strides: int, groups: int, *, name: str) -> Conv:
        init = self.initialization
        kernel_init = init.shortcut if name == 'shortcut_conv' else init.conv
        if init.by_group and groups > 1:
            kernel_init = initializers.variance_scaling(2.0 * groups, 'fan_out', 'normal')
        return Conv(
            features,
            (window, window),
            strides=strides,
            groups=groups,
            use_bias=False,
            kernel_init=kernel_init,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _norm(self, name: str, *, zero: bool = False) -> BatchNorm:
        scale = initializers.zeros if zero else initializers.ones
        return BatchNorm(scale_init=scale, param_dtype=self.param_dtype, name=name)
