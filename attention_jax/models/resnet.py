"""One residual network: stem, stages of blocks, head. What differs between networks is data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.models import placement as placements
from attention_jax.models.attach import Mechanism
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
        last_scale: of the scale of each branch's last norm.
    """

    conv: Initializer = kaiming_fan_out
    shortcut: Initializer = kaiming_fan_out
    head: Initializer = torch_kernel
    head_bias: Initializer | None = None
    by_group: bool = False
    last_scale: Initializer = initializers.ones

    def of(self, groups: int) -> Initializer:
        """Of a convolution with this many groups, a shortcut's apart."""
        if self.by_group and groups > 1:
            return initializers.variance_scaling(2.0 * groups, 'fan_out', 'normal')
        return self.conv


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
        self.sites()

    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each stage's first block."""
        if self.strides is None:
            return (1,) + (2,) * (len(self.depths) - 1)
        return tuple(self.strides)

    def sites(self) -> placements.Sites:
        """Where the mechanism stands, with its arguments there, as `models.placement` says it."""
        return placements.resolve(
            self.attention, self.placement, self.attention_args, self.depths, self.block
        )

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Logits `[b, num_classes]` of images, or pooled features `[b, c]` without a head.

        Args:
            x: `[b, h, w, c]`, or `[b, t, h, w, c]`; normalised, any number of channels.
            train: uses the batch's statistics and dropout.
            return_stages: returns a pair, of the above and a dict: `stem`, `stage1`... and
                `features` if there are any `[b, h', w', c']`, and `pre_logits` `[b, c]`.

        Raises:
            ValueError: an image smaller than the network's stride, or what the mechanism refuses.
        """
        self._check_input(x)
        types = {'param_dtype': self.param_dtype}
        init, act = INITIALIZATIONS[self.initialization], _ACTIVATIONS[self.activation]
        if self.zero_init_last:
            init = dataclasses.replace(init, last_scale=initializers.zeros)
        conv = functools.partial(Conv, use_bias=False, kernel_init=init.conv, **types)
        norm = functools.partial(BatchNorm, **types)
        dense = functools.partial(Dense, kernel_init=init.head, bias_init=init.head_bias, **types)
        block = functools.partial(
            Block, shortcut=self.shortcut, initialization=init, conv=conv, norm=norm, act=act
        )
        mechanism = functools.partial(
            Mechanism, self.attention, self._common_arguments(), self.identity_init
        )
        sites, called = self.sites(), {'parent': self, 'train': train}

        x = x.astype(self.dtype or x.dtype)
        here = mechanism(sites.get('stem', {}))
        for i, (window, width, strides) in enumerate(self._stem_layers(), 1):
            x = here.at('pre_conv', x, name=f'stem_attention{i}', **called)
            x = conv(width, (window, window), strides, name=f'stem_conv{i}')(x)
            x = act(norm(name=f'stem_norm{i}')(x, train=train))
        if self.stem != 'cifar' and self.stem_pool != 'none':
            border = {'ceil_mode': True} if self.stem_pool == 'max_ceil' else {'padding': 1}
            x = functional.max_pool(x, 3, strides=2, **border)
        stages = {'stem': x}

        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist())
        shapes = zip(self.depths, self.widths, self.stage_strides(), strict=True)
        for stage, (depth, planes, strides) in enumerate(shapes, 1):
            for b in range(depth):
                name = f'stage{stage}_block{b}'
                here = mechanism(sites.get(name, {}))
                layers = self._block_layers(planes, strides if b == 0 else 1)
                x = here.at('before_block', x, name=f'{name}_before_block_attention', **called)
                x = block(layers, here, next(rates), name=name)(x, train=train)
                x = here.at('after_block', x, name=f'{name}_after_block_attention', **called)
                x = here.at('stage', x, name=f'{name}_stage_attention', **called)
            if stage == 1 and self.spatial_dims == 3:
                x = functional.max_pool(x, (2, 1, 1), strides=(2, 1, 1), ceil_mode=True)
            stages[f'stage{stage}'] = x

        if self.features:
            x = conv(self.features, (1, 1), name='features_conv')(x)
            x = act(norm(name='features_norm')(x, train=train))
            stages['features'] = x
        x = stages['pre_logits'] = self._pool(x, train=train)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = dense(self.num_classes, name='head')(x)
        return (x, stages) if return_stages else x

    def _check_input(self, x: jax.Array) -> None:
        checks.feature_map(x)
        if self.spatial_dims == 3 and x.ndim != 5:
            raise ValueError(f'x must be [b, t, h, w, c] with spatial_dims=3, got shape {x.shape}')
        stride = (1 if self.stem == 'cifar' else 4) * math.prod(self.stage_strides())
        checks.covers_stride(x, stride)

    def _common_arguments(self) -> Mapping[str, Any]:
        """What the mechanism is built with at all its sites."""
        common = {'param_dtype': self.param_dtype}
        if self.attention is None or self.spatial_dims == 2:
            return common
        takes_time = 'spatial_dims' in field_names(attention_entry(self.attention).cls)
        return common | {'spatial_dims': 3} if takes_time else common

    def _stem_layers(self) -> list[tuple[int, int, int]]:
        """Window, width and stride of each convolution of the stem."""
        windows = {'7x7': (7,), 'deep': (3, 3, 3), 'cifar': (3,)}[self.stem]
        if len(self.stem_widths) != len(windows):
            raise ValueError(
                f'stem_widths must have {len(windows)} entries for stem {self.stem!r}, '
                f'got {tuple(self.stem_widths)}'
            )
        strides = [1 if self.stem == 'cifar' else 2] + [1] * (len(windows) - 1)
        if self.stem == 'deep' and self.stem_pool == 'none':
            strides[-1] = 2
        return list(zip(windows, self.stem_widths, strides, strict=True))

    def _block_layers(self, planes: int, strides: int) -> tuple['Layer', ...]:
        """The convolutions of a block's branch."""
        if self.block == 'basic':
            return Layer(planes, 3, strides), Layer(planes, 3)
        if self.group_width:
            inner, groups = planes, planes // self.group_width
        else:
            inner, groups = planes * self.base_width // 64, self.cardinality
            inner *= groups
        first, second = (strides, 1) if self.stride_in == 'conv1' else (1, strides)
        return (
            Layer(inner // self.first_divisor, 1, first),
            Layer(inner, 3, second, groups, self.conv2_pool if second > 1 else None),
            Layer(planes * EXPANSION['bottleneck'], 1),
        )

    def _pool(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[..., h, w, c] -> [b, c']`."""
        if self.pool == 'isqrt_cov':
            arguments = {'param_dtype': self.param_dtype, **(self.pool_args or {})}
            x = create_attention('isqrt_cov', **arguments, name='pool')(x, train=train)
        else:
            x = functional.spatial_mean(x).astype(x.dtype)
        return x.mean(axis=1) if self.spatial_dims == 3 else x


class Layer(NamedTuple):
    """A convolution of a block's branch, without a bias, and the norm that follows it."""

    features: int
    window: int
    strides: int = 1
    groups: int = 1
    pool: str | None = None  # 'before' or 'after' it, where a 3x3 average pool takes its stride


class Block(nn.Module):
    """A residual block: `act(branch(x) + shortcut(x))`.

    Attributes:
        layers: of the branch, with the activation between them.
        attention: the mechanism at the places of this block.
        drop_path_rate: probability that the branch is dropped in training.
        shortcut: 'conv', 'avg', 'conv3' or 'pad', used where the stride or the width changes.
        initialization: initialisers.
        conv: builds a `Conv`, given what is its own.
        norm: builds a norm likewise.
        act: the activation.
    """

    layers: Sequence[Layer]
    attention: Mechanism
    drop_path_rate: float
    shortcut: str
    initialization: Initialization
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the block to `[..., h, w, c]`."""
        attend = functools.partial(self.attention.at, parent=self, train=train)
        y = x
        for i, layer in enumerate(self.layers, 1):
            if layer.pool == 'before':
                y = functional.avg_pool(y, 3, strides=layer.strides, padding=1)
            y = self._layer(i, layer, y, train=train)
            if layer.pool == 'after':
                y = functional.avg_pool(y, 3, strides=layer.strides, padding=1)
            if i == 2:
                y = attend('mid', y)
        y = attend('branch', y)
        if 'branch_after_relu' in self.attention:
            y = attend('branch_after_relu', self.act(y))
        y = StochasticDepth(self.drop_path_rate)(y, train=train)
        return self.act(y + self._shortcut(x, train=train))

    def _layer(self, i: int, layer: Layer, y: jax.Array, *, train: bool) -> jax.Array:
        """The branch's convolution number i, norm and activation, or a mechanism in their place."""
        attend = functools.partial(self.attention.at, parent=self, train=train)
        shape = {'features': layer.features, 'strides': 1 if layer.pool else layer.strides}
        if f'conv{i}' in self.attention:
            return self.attention.build(f'conv{i}', name=f'conv{i}', **shape)(y, train=train)
        last = i == len(self.layers)
        conv = self.conv(
            kernel_size=(layer.window, layer.window),
            groups=layer.groups,
            kernel_init=self.initialization.of(layer.groups),
            name=f'conv{i}',
            **shape,
        )
        scale_init = self.initialization.last_scale if last else initializers.ones
        norm = self.norm(scale_init=scale_init, name=f'norm{i}')
        y = conv(attend('pre_conv', y, name=f'attention{i}'))
        y = norm(attend(f'conv{i}_pre_norm', y), train=train)
        return y if last else self.act(y)

    def _shortcut(self, x: jax.Array, *, train: bool) -> jax.Array:
        features = self.layers[-1].features
        strides = math.prod(layer.strides for layer in self.layers)
        if strides == 1 and x.shape[-1] == features:
            return x
        if self.shortcut == 'pad':
            x = x[..., ::strides, ::strides, :]
            new = features - x.shape[-1]
            return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((new // 2, new - new // 2),))
        window = (3, 3) if self.shortcut == 'conv3' and strides > 1 else (1, 1)
        if self.shortcut == 'avg' and strides > 1:
            x = functional.avg_pool(
                x, strides, strides=strides, ceil_mode=True, count_padding=False
            )
            strides = 1
        x = self.attention.at('pre_conv', x, parent=self, train=train, name='shortcut_attention')
        kernel_init = self.initialization.shortcut
        x = self.conv(features, window, strides, kernel_init=kernel_init, name='shortcut_conv')(x)
        return self.norm(name='shortcut_norm')(x, train=train)
