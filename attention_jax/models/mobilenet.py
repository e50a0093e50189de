"""MobileNetV2: inverted residuals, with any mechanism inside them; and its named forms."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from attention_jax.models.registry import create_described, register_model
from attention_jax.modules.initializers import Initializer, kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv, Dense, StochasticDepth
from attention_jax.modules.registry import (
    TorchName,
    TorchNames,
    attention_entry,
    create_attention,
    names_for,
)

# Expansion, channels, blocks and stride of each stage (table 2 of the paper).
ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# Of depthwise convolutions and of the head; all others are normal by fan-out, biases 0.
INITIALIZATIONS: dict[str, tuple[Initializer, Initializer]] = {
    # fan-out over all channels; d-li14's, ECA's and the coordinate attention authors' too
    'torchvision': (kaiming_fan_out, initializers.normal(0.01)),
    # fan-out of one group, which is its fan-in
    'timm': (
        initializers.variance_scaling(2.0, 'fan_in', 'normal'),
        initializers.variance_scaling(1 / 3, 'fan_out', 'uniform'),
    ),
}


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with any mechanism at any place.

    Attributes:
        width: multiplies every width; that of `features` only if above 1.
        width_divisor: widths are rounded to a multiple of it, never more than 10 % below; None
            rounds down to integers (ECA's and Triplet's code).
        rows: expansion, channels, blocks and stride of each stage.
        stem_width: channels of the first convolution.
        stem_strides: its stride.
        features: channels of the 1x1 convolution before the pool.
        attention: registry name of a mechanism, or None.
        placement: where it sits, a text of `models.placement` (`expanded`, `output`,
            `depthwise_pre_norm`, ...; a stage is a row); None is its authors' choice.
        attention_args: its arguments: a mapping, or a sequence of one mapping a stage.
        identity_init: a mechanism that does not start as the identity is made to
            (`models.attach`).
        num_classes: width of the head; 0 drops it and returns the pooled features.
        initialization: key of `INITIALIZATIONS`.
        dropout_rate: of the pooled features in training.
        drop_path_rate: probability that the last block's branch is dropped in training, for each
            example (stochastic depth); it rises linearly from 0 over the blocks, and acts where
            there is a sum.
        dtype: type of the computation; None is the input's. Norm statistics are float32.
        param_dtype: type of the parameters.
    """

    width: float = 1.0
    width_divisor: int | None = 8
    rows: Sequence[Sequence[int]] = ROWS
    stem_width: int = 32
    stem_strides: int = 2
    features: int = 1280
    attention: str | None = None
    placement: str | None = None
    attention_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    identity_init: bool = False
    num_classes: int = 1000
    initialization: str = 'torchvision'
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Refuses arguments that no input could make right."""
        super().__post_init__()
        checks.choice('initialization', self.initialization, INITIALIZATIONS)
        checks.at_least('num_classes', self.num_classes, 0)
        checks.rate('dropout_rate', self.dropout_rate)
        checks.rate('drop_path_rate', self.drop_path_rate)
        if not self.width > 0:
            raise ValueError(f'width must be positive, got {self.width}')
        if self.width_divisor is not None:
            checks.at_least('width_divisor', self.width_divisor, 1)
        for row in self.rows:
            if len(row) != 4 or not all(n >= 1 for n in row):
                raise ValueError(
                    f'rows must be (expansion, channels, blocks, stride) a stage, positive, '
                    f'got {tuple(row)}'
                )
        if self.attention is None and self.attention_args:
            raise ValueError('attention_args need attention, got attention=None')
        self.stage_arguments()
        self.resolved_placement()

    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(depth for _, _, depth, _ in self.rows)

    def stage_arguments(self) -> tuple[Mapping[str, Any], ...]:
        """The mechanism's arguments in each stage."""
        return placements.stage_arguments(self.attention_args, len(self.rows))

    def resolved_placement(self) -> placements.Placement | None:
        """The placement with its blocks, checked against the mechanism; None without one."""
        return placements.resolve(
            self.attention, self.placement, self.depths(), 'inverted', 'MobileNetV2'
        )

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
        self._check_input(x)
        types = {'param_dtype': self.param_dtype}
        placement = self.resolved_placement()
        builders = [
            self.attention
            and functools.partial(create_attention, self.attention, **{**types, **arguments})
            for arguments in self.stage_arguments()
        ]
        depthwise, head = INITIALIZATIONS[self.initialization]

        def conv_norm(x: jax.Array, name: str, width: int, window: int, strides: int) -> jax.Array:
            conv = Conv(
                width,
                (window, window),
                strides=strides,
                use_bias=False,
                kernel_init=kaiming_fan_out,
                name=f'{name}_conv',
                **types,
            )
            return jax.nn.relu6(BatchNorm(name=f'{name}_norm', **types)(conv(x), train=train))

        x = x.astype(self.dtype or x.dtype)
        x = conv_norm(x, 'stem', self._scaled(self.stem_width, self.width), 3, self.stem_strides)
        stages = {'stem': x}
        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths())).tolist())
        for s, (expansion, channels, depth, strides) in enumerate(self.rows):
            for b in range(depth):
                block = functools.partial(
                    InvertedResidual,
                    features=self._scaled(channels, self.width),
                    expansion=expansion,
                    strides=strides if b == 0 else 1,
                    identity_init=self.identity_init,
                    drop_path_rate=next(rates),
                    depthwise_init=depthwise,
                    **types,
                )
                x = run_block(
                    self, block, x, s, b, placement=placement, build=builders[s], train=train
                )
            stages[f'stage{s + 1}'] = x

        x = conv_norm(x, 'features', self._scaled(self.features, max(1.0, self.width)), 1, 1)
        x = functional.spatial_mean(x).astype(x.dtype)
        stages['pre_logits'] = x
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = Dense(
                self.num_classes,
                kernel_init=head,
                bias_init=initializers.zeros,
                name='head',
                **types,
            )(x)
        return (x, stages) if return_stages else x

    def _scaled(self, channels: int, width: float) -> int:
        """`channels` times `width`, rounded."""
        exact, divisor = channels * width, self.width_divisor
        if divisor is None:
            return max(1, int(exact))
        rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * exact else rounded

    def _check_input(self, x: jax.Array) -> None:
        checks.feature_map(x)
        stride = math.prod((self.stem_strides, *(strides for *_, strides in self.rows)))
        checks.covers_stride(x, stride)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 to `features`; then the sum.

    The last 1x1 has no activation. The input is added where neither stride nor width changes.

    Attributes:
        features: output width.
        expansion: of the channels; at 1 the first convolution is left out.
        strides: of the depthwise convolution.
        attention: builds the mechanism, given a name.
        where: the place of it in this block, a key of `models.placement.WHERE`, or None.
        identity_init: the mechanism starts as the identity.
        drop_path_rate: probability that the branch is dropped in training.
        depthwise_init: initialiser of the depthwise kernel.
        param_dtype: type of the parameters.
    """

    features: int
    expansion: int
    strides: int
    attention: Callable[..., nn.Module] | None
    where: str | None
    identity_init: bool
    drop_path_rate: float
    depthwise_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the block to `[..., h, w, c]`."""
        c = x.shape[-1]
        types = {'param_dtype': self.param_dtype}

        def attend(y: jax.Array, where: str) -> jax.Array:
            if self.where != where:
                return y
            identity = self.identity_init
            return attach(self, self.attention, 'attention', y, train=train, identity_init=identity)

        def norm(y: jax.Array, name: str) -> jax.Array:
            return BatchNorm(name=f'{name}_norm', **types)(y, train=train)

        pointwise = functools.partial(
            Conv, kernel_size=(1, 1), use_bias=False, kernel_init=kaiming_fan_out, **types
        )
        y = x
        if self.expansion != 1:
            y = pointwise(c * self.expansion, name='expand_conv')(y)
            y = jax.nn.relu6(norm(y, 'expand'))
        y = Conv(
            y.shape[-1],
            (3, 3),
            strides=self.strides,
            groups=y.shape[-1],
            use_bias=False,
            kernel_init=self.depthwise_init,
            name='depthwise_conv',
            **types,
        )(y)
        y = attend(y, 'depthwise_pre_norm')
        y = attend(jax.nn.relu6(norm(y, 'depthwise')), 'expanded')
        y = norm(pointwise(self.features, name='project_conv')(y), 'project')
        y = attend(y, 'output')
        if self.strides != 1 or c != self.features:
            return y
        return x + StochasticDepth(self.drop_path_rate)(y, train=train)


# The named networks.


def _register(name: str, paper: str, **description: Any) -> None:
    def build(**arguments: Any) -> MobileNetV2:
        return create_described(MobileNetV2, description, arguments)

    usual = 'timm' if 'timm' in paper else 'torchvision'
    facts = {'family': 'mobilenet', 'paper': paper, 'preprocessing': usual}
    register_model(name, build, torch_names=torch_names, **facts)


def _register_all() -> None:
    _register('mobilenetv2', 'arXiv 1801.04381', dropout_rate=0.2)
    for name, width in (('mobilenetv2_100', 1.0), ('mobilenetv2_140', 1.4)):
        paper = 'arXiv 1801.04381, as timm has it'
        _register(name, paper, width=width, initialization='timm')
    _register(
        'eca_mobilenetv2',
        'arXiv 1910.03151',
        attention='eca',
        placement='output',
        attention_args=tuple({'kernel_size': 3 if c >= 96 else 1} for _, c, _, _ in ROWS),
        width_divisor=None,
        dropout_rate=0.25,
    )
    _register(
        'triplet_mobilenetv2',
        'arXiv 2010.03045',
        attention='triplet',
        placement='output',
        attention_args={'norm_scale_init': 1.0},
        width_divisor=None,
        dropout_rate=0.25,
    )
    _register(
        'ca_mobilenetv2',
        'arXiv 2103.02907',
        attention='coordinate',
        placement='expanded',
        dropout_rate=0.1,
    )
    for attention, paper, baseline, reductions in (
        ('se', 'arXiv 1709.01507', {'use_bias': False}, (16, 24, 32)),
        ('cbam', 'arXiv 1807.06521', {}, (16, 24)),
    ):
        _register(
            f'{attention}_mobilenetv2_out',
            f'{paper}, as ZjjConan/SimAM has it',
            attention=attention,
            placement='output',
            attention_args={'reduction': 4, **baseline},
        )
        for reduction in reductions:
            _register(
                f'{attention}_mobilenetv2_r{reduction}',
                f'{paper}, at the place of coordinate attention (arXiv 2103.02907)',
                attention=attention,
                placement='expanded',
                attention_args={'reduction': reduction},
                dropout_rate=0.1,
            )


# Names in PyTorch.


def torch_names(network: MobileNetV2) -> TorchNames:
    """Names of weights in the PyTorch MobileNetV2s.

    'torchvision' is also ECA's and Triplet's, 'simam' that of ZjjConan/SimAM; 'flat' (d-li14, the
    coordinate attention authors) numbers the layers of a block in one sequence. timm knows a
    mechanism on the expanded channels only, as `se`; elsewhere it is called so too.

    Args:
        network: the MobileNetV2.

    Returns:
        Naming scheme -> foreign name -> our path.
    """
    tables: Mapping[str, Mapping[str, TorchName]] = {'': {}}
    if network.attention is not None:
        module = create_attention(network.attention, **network.stage_arguments()[-1])
        names = names_for(attention_entry(network.attention), module)
        tables = {f'.{scheme}': table for scheme, table in names.items()}
    return {
        f'{style}{scheme}': _names(network, style, table)
        for scheme, table in tables.items()
        for style in ('torchvision', 'simam', 'flat', 'timm')
    }


def _names(
    network: MobileNetV2, style: str, table: Mapping[str, TorchName]
) -> dict[str, TorchName]:
    names: dict[str, TorchName] = {}
    placement = network.resolved_placement()
    index = 1  # of a block in one sequence for all, after the stem
    for s, (expansion, _, depth, _) in enumerate(network.rows):
        position = 0  # of a block in timm's sequence of a stage
        for b in range(depth):
            ours = f'stage{s + 1}_block{b}'
            for where in ('before_block', None, 'after_block', 'stage'):
                theirs = f'blocks.{s}.{position}' if style == 'timm' else f'features.{index}'
                if where is None:
                    inside = placement and placement.inside(s, b)
                    for layer, part in _layers(style, expansion, inside):
                        if part == 'attention':
                            names[f'{theirs}.{layer}.**'] = (f'{ours}/attention/**', table)
                        else:
                            names[f'{theirs}.{layer}.*'] = f'{ours}/{part}/*'
                elif placement and placement.at(where, s, b):
                    names[f'{theirs}.**'] = (f'{ours}_{where}_attention/**', table)
                else:
                    continue
                index, position = index + 1, position + 1
    if style == 'timm':
        ends = ('conv_stem', 'bn1', 'conv_head', 'bn2', 'classifier')
    else:
        last = 'conv' if style == 'flat' else f'features.{index}'
        head = 'classifier.0' if style == 'simam' else 'classifier.1'
        ends = ('features.0.0', 'features.0.1', f'{last}.0', f'{last}.1', head)
    layers = ('stem_conv', 'stem_norm', 'features_conv', 'features_norm', 'head')
    return names | {f'{theirs}.*': f'{ours}/*' for theirs, ours in zip(ends, layers, strict=True)}


def _layers(style: str, expansion: int, where: str | None) -> Iterator[tuple[str, str]]:
    """Foreign names and ours of the layers of one block."""
    layers = ('depthwise', 'project') if expansion == 1 else ('expand', 'depthwise', 'project')
    if style == 'timm':
        convs = ('conv_dw', 'conv_pw') if expansion == 1 else ('conv_pw', 'conv_dw', 'conv_pwl')
        for i, (conv, layer) in enumerate(zip(convs, layers, strict=True), 1):
            yield conv, f'{layer}_conv'
            yield f'bn{i}', f'{layer}_norm'
        yield 'se', 'attention'
        return
    parts = [[f'{layer}_conv', f'{layer}_norm', 'relu'] for layer in layers[:-1]]
    if where == 'depthwise_pre_norm':
        parts[-1].insert(1, 'attention')
    parts += [['attention']] * (where == 'expanded')
    parts += [['project_conv'], ['project_norm']]
    parts += [['attention']] * (where == 'output')
    if style == 'flat':
        parts = [[part] for group in parts for part in group]
    for i, group in enumerate(parts):
        for j, part in enumerate(group):
            if part != 'relu':
                yield f'conv.{i}.{j}' if len(group) > 1 else f'conv.{i}', part


_register_all()
