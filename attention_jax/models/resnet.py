"""One residual network: stem, stages of blocks, head. What differs between networks is data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional, registry
from attention_jax.models import placement as placements
from attention_jax.modules.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dtype,
    Initializer,
    kaiming_fan_out,
    torch_kernel,
)

_kaiming_fan_in = initializers.variance_scaling(2.0, 'fan_in', 'normal')

EXPANSION = {'basic': 1, 'bottleneck': 4}


@dataclasses.dataclass(frozen=True)
class Initialization:
    """Initialisers of a network; a `head_bias` of None is PyTorch's default."""

    conv: Initializer = kaiming_fan_out
    shortcut: Initializer = kaiming_fan_out
    head: Initializer = torch_kernel
    head_bias: Initializer | None = None


INITIALIZATIONS = {
    'torchvision': Initialization(),
    # akamaster/pytorch_resnet_cifar10
    'cifar': Initialization(_kaiming_fan_in, _kaiming_fan_in, _kaiming_fan_in),
    # Jongchan/attention-module: goes by name, and a shortcut's names hold no 'conv'
    'cbam': Initialization(
        shortcut=torch_kernel, head=_kaiming_fan_in, head_bias=initializers.zeros
    ),
    # facebookresearch/video-nonlocal-net
    'non_local': Initialization(head=initializers.normal(0.01), head_bias=initializers.zeros),
}


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv 1512.03385) with any mechanism at any place.

    Attributes:
        depths: number of blocks of each stage.
        widths: planes of each stage; a bottleneck puts out four times as many channels.
        block: 'basic' (two 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
        stem: '7x7' (stride 2, then a 3x3 max pool of stride 2), 'deep' (three 3x3 of
            `stem_widths`, then the pool; ResNet-C and -D) or 'cifar' (one 3x3, no pool).
        stem_widths: channels of the stem's convolutions: one, or three for 'deep'.
        stride_in: the strided convolution of a bottleneck: 'conv2' (its 3x3; v1.5, most released
            code) or 'conv1' (its first 1x1; v1, He et al.).
        shortcut: 'conv' (1x1 and norm), 'avg' (2x2 average pool first; ResNet-D) or 'pad' (every
            second pixel, zeros for the new channels; option A of the CIFAR networks).
        cardinality: groups of a bottleneck's 3x3 (ResNeXt).
        base_width: width of one group at 64 planes.
        attention: registry name of a mechanism, or None.
        placement: where it sits, a text of `models.placement`; None is its authors' choice.
        attention_args: its arguments: a mapping, or a sequence of one mapping a stage.
        num_classes: width of the head; 0 drops it and returns the pooled features.
        zero_init_last: the last norm of each branch starts with scale 0.
        initialization: key of `INITIALIZATIONS`.
        dropout_rate: of the pooled features in training.
        dtype: type of the computation; None is the input's. Norm statistics are float32.
        param_dtype: type of the parameters.
    """

    depths: Sequence[int]
    widths: Sequence[int] = (64, 128, 256, 512)
    block: str = 'bottleneck'
    stem: str = '7x7'
    stem_widths: Sequence[int] = (64,)
    stride_in: str = 'conv2'
    shortcut: str = 'conv'
    cardinality: int = 1
    base_width: int = 64
    attention: str | None = None
    placement: str | None = None
    attention_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    num_classes: int = 1000
    zero_init_last: bool = False
    initialization: str = 'torchvision'
    dropout_rate: float = 0.0
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Refuses arguments that no input could make right."""
        super().__post_init__()
        checks.choice('block', self.block, EXPANSION)
        checks.choice('stem', self.stem, ('7x7', 'deep', 'cifar'))
        checks.choice('stride_in', self.stride_in, ('conv1', 'conv2'))
        checks.choice('shortcut', self.shortcut, ('conv', 'avg', 'pad'))
        checks.choice('initialization', self.initialization, INITIALIZATIONS)
        checks.at_least('num_classes', self.num_classes, 0)
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f'widths must have one entry a stage: {len(self.depths)} stages, '
                f'got {tuple(self.widths)}'
            )
        self.stage_arguments()
        self.resolved_placement()

    def stage_arguments(self) -> tuple[Mapping[str, Any], ...]:
        """The mechanism's arguments in each stage."""
        arguments = self.attention_args or {}
        if isinstance(arguments, Mapping):
            return (arguments,) * len(self.depths)
        if len(arguments) != len(self.depths):
            raise ValueError(
                f'attention_args must be one dict or one a stage: {len(self.depths)} stages, '
                f'got {len(arguments)}'
            )
        return tuple(arguments)

    def resolved_placement(self) -> placements.Placement | None:
        """The placement with its blocks, checked against the mechanism; None without one."""
        if self.attention is None:
            if self.placement is not None or self.attention_args:
                raise ValueError('placement and attention_args need attention, got attention=None')
            return None
        entry = registry.attention_entry(self.attention)
        text = self.placement or placements.default(entry, self.depths, self.block)
        placement = placements.parse(text, self.depths)
        replaces = placement.where in ('conv1', 'conv2')
        if replaces and not entry.replaces_convolution:
            raise ValueError(
                f'placement {text!r} puts attention in place of a convolution, which '
                f'{self.attention!r} is not: try branch'
            )
        if not replaces and (entry.replaces_convolution or not entry.preserves_shape):
            raise ValueError(
                f'placement {text!r} needs attention that keeps its input, {self.attention!r} '
                f'replaces a convolution or changes the shape: try conv2'
            )
        if placement.where == 'mid' and self.block != 'bottleneck':
            raise ValueError(f'placement {text!r} needs bottlenecks, block is {self.block!r}')
        return placement

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
            x: `[b, h, w, c]`, normalised, any number of channels.
            train: uses the batch's statistics and dropout.
            return_stages: also returns the stages' outputs by name.

        Returns:
            Logits `[b, num_classes]`, or pooled features `[b, c]` without a head; with
            `return_stages` a pair of these and a dict: `stem`, `stage1`... `[b, h', w', c']`, and
            `pre_logits` `[b, c]`.

        Raises:
            ValueError: an image smaller than the network's stride, or what the mechanism refuses.
        """
        checks.feature_map(x)
        self._check_size(x)
        init = INITIALIZATIONS[self.initialization]
        types = {'param_dtype': self.param_dtype}
        placement, arguments = self.resolved_placement(), self.stage_arguments()

        def attention(stage: int) -> Callable[..., nn.Module] | None:
            if placement is None:
                return None
            return functools.partial(
                registry.create_attention, self.attention, **{**types, **arguments[stage]}
            )

        x = x.astype(self.dtype or x.dtype)
        x = self._stem(
            x, attention(0) if placement and placement.where == 'pre_conv' else None, train=train
        )
        stages = {'stem': x}
        for s, (depth, planes) in enumerate(zip(self.depths, self.widths, strict=True)):
            for b in range(depth):
                name = f'stage{s + 1}_block{b}'
                for where in ('before_block', None, 'after_block', 'stage'):
                    if where is None:
                        x = Block(
                            planes=planes,
                            kind=self.block,
                            strides=2 if s > 0 and b == 0 else 1,
                            stride_in=self.stride_in,
                            shortcut=self.shortcut,
                            cardinality=self.cardinality,
                            base_width=self.base_width,
                            attention=attention(s),
                            where=placement.where
                            if placement and b in placement.blocks[s]
                            else None,
                            zero_init_last=self.zero_init_last,
                            initialization=init,
                            param_dtype=self.param_dtype,
                            name=name,
                        )(x, train=train)
                    elif placement and placement.at(where, s, b):
                        x = attention(s)(name=f'{name}_{where}_attention')(x, train=train)
            stages[f'stage{s + 1}'] = x

        x = functional.spatial_mean(x).astype(x.dtype)
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

    def _check_size(self, x: jax.Array) -> None:
        stride = (1 if self.stem == 'cifar' else 4) * 2 ** (len(self.depths) - 1)
        if min(x.shape[-3:-1]) < stride:
            raise ValueError(
                f'x has {x.shape[-3]} x {x.shape[-2]} pixels, the network needs at least '
                f'{stride} x {stride}'
            )

    def _stem(
        self, x: jax.Array, attention: Callable[..., nn.Module] | None, *, train: bool
    ) -> jax.Array:
        windows = {'7x7': (7,), 'deep': (3, 3, 3), 'cifar': (3,)}[self.stem]
        if len(self.stem_widths) != len(windows):
            raise ValueError(
                f'stem_widths must have {len(windows)} entries for stem {self.stem!r}, '
                f'got {tuple(self.stem_widths)}'
            )
        for i, (window, width) in enumerate(zip(windows, self.stem_widths, strict=True), 1):
            if attention:
                x = attention(name=f'stem_attention{i}')(x, train=train)
            x = Conv(
                width,
                (window, window),
                strides=2 if i == 1 and self.stem != 'cifar' else 1,
                use_bias=False,
                kernel_init=INITIALIZATIONS[self.initialization].conv,
                param_dtype=self.param_dtype,
                name=f'stem_conv{i}',
            )(x)
            x = BatchNorm(param_dtype=self.param_dtype, name=f'stem_norm{i}')(x, train=train)
            x = jax.nn.relu(x)
        return x if self.stem == 'cifar' else functional.max_pool(x, 3, strides=2, padding=1)


class Block(nn.Module):
    """A residual block: `relu(branch(x) + shortcut(x))`.

    Attributes:
        planes: width of the stage.
        kind: 'basic' or 'bottleneck'.
        strides: stride of the block.
        stride_in: the bottleneck's strided convolution, 'conv1' or 'conv2'.
        shortcut: 'conv', 'avg' or 'pad', used where the stride or the width changes.
        cardinality: groups of the bottleneck's 3x3.
        base_width: width of one group at 64 planes.
        attention: builds the mechanism, given a name (and features and strides where it replaces a
            convolution).
        where: the place of it in this block, a key of `models.placement.WHERE`, or None.
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
    attention: Callable[..., nn.Module] | None
    where: str | None
    zero_init_last: bool
    initialization: Initialization
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the block to `[b, h, w, c]`."""
        features = self.planes * EXPANSION[self.kind]
        if self.kind == 'basic':
            layers = [(self.planes, 3, self.strides, 1), (self.planes, 3, 1, 1)]
        else:
            inner = self.planes * self.base_width // 64 * self.cardinality
            first, second = (self.strides, 1) if self.stride_in == 'conv1' else (1, self.strides)
            layers = [
                (inner, 1, first, 1),
                (inner, 3, second, self.cardinality),
                (features, 1, 1, 1),
            ]

        y = x
        for i, (width, window, strides, groups) in enumerate(layers, 1):
            last = i == len(layers)
            if self.where == f'conv{i}':  # it brings its own norm and activation
                y = self.attention(name=f'conv{i}', features=width, strides=strides)(y, train=train)
            else:
                if self.where == 'pre_conv':
                    y = self.attention(name=f'attention{i}')(y, train=train)
                y = self._conv(width, window, strides, groups, name=f'conv{i}')(y)
                if self.where == 'conv2_pre_norm' and i == 2:
                    y = self.attention(name='attention')(y, train=train)
                y = self._norm(f'norm{i}', zero=last and self.zero_init_last)(y, train=train)
                y = y if last else jax.nn.relu(y)
            if self.where == 'mid' and i == 2:
                y = self.attention(name='attention')(y, train=train)
        if self.where == 'branch_after_relu':
            y = jax.nn.relu(y)
        if self.where in ('branch', 'branch_after_relu'):
            y = self.attention(name='attention')(y, train=train)
        return jax.nn.relu(y + self._shortcut(x, features, train=train))

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
            x = self.attention(name='shortcut_attention')(x, train=train)
        x = self._conv(features, 1, strides, 1, name='shortcut_conv')(x)
        return self._norm('shortcut_norm')(x, train=train)

    def _conv(self, features: int, window: int, strides: int, groups: int, *, name: str) -> Conv:
        init = self.initialization
        return Conv(
            features,
            (window, window),
            strides=strides,
            groups=groups,
            use_bias=False,
            kernel_init=init.shortcut if name == 'shortcut_conv' else init.conv,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _norm(self, name: str, *, zero: bool = False) -> BatchNorm:
        scale = initializers.zeros if zero else initializers.ones
        return BatchNorm(scale_init=scale, param_dtype=self.param_dtype, name=name)
