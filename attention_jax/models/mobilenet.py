"""MobileNetV2: inverted residuals, with any mechanism inside them."""

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
from attention_jax.models.attach import Mechanism
from attention_jax.modules.initializers import Initializer, kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv, Dense, StochasticDepth
from attention_jax.modules.widths import round_to_multiple

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
        self.sites()

    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(depth for _, _, depth, _ in self.rows)

    def sites(self) -> placements.Sites:
        """Where the mechanism stands, with its arguments there, as `models.placement` says it."""
        shape = (self.depths(), 'inverted', 'MobileNetV2')
        return placements.resolve(self.attention, self.placement, self.attention_args, *shape)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Logits `[b, num_classes]` of images, or pooled features `[b, c]` without a head.

        Args:
            x: `[b, h, w, c]`, normalised, any number of channels.
            train: uses the batch's statistics and dropout.
            return_stages: returns a pair, of the above and a dict: `stem`, `stage1`...
                `[b, h', w', c']`, and `pre_logits` `[b, c]`.

        Raises:
            ValueError: an image smaller than the network's stride, or what the mechanism refuses.
        """
        checks.feature_map(x)
        stride = math.prod((self.stem_strides, *(strides for *_, strides in self.rows)))
        checks.covers_stride(x, stride)
        types = {'param_dtype': self.param_dtype}
        depthwise_init, head_init = INITIALIZATIONS[self.initialization]
        conv = functools.partial(Conv, use_bias=False, kernel_init=kaiming_fan_out, **types)
        norm = functools.partial(BatchNorm, **types)
        depthwise = functools.partial(conv, kernel_size=(3, 3), kernel_init=depthwise_init)
        block = functools.partial(InvertedResidual, conv=conv, depthwise=depthwise, norm=norm)
        mechanism = functools.partial(Mechanism, self.attention, types, self.identity_init)
        sites, called = self.sites(), {'parent': self, 'train': train}

        x = x.astype(self.dtype or x.dtype)
        width = self._scaled(self.stem_width, self.width)
        x = conv(width, (3, 3), strides=self.stem_strides, name='stem_conv')(x)
        x = jax.nn.relu6(norm(name='stem_norm')(x, train=train))
        stages = {'stem': x}

        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths())).tolist())
        for stage, (expansion, channels, depth, strides) in enumerate(self.rows, 1):
            width = self._scaled(channels, self.width)
            for b in range(depth):
                name = f'stage{stage}_block{b}'
                here = mechanism(sites.get(name, {}))
                x = here.at('before_block', x, name=f'{name}_before_block_attention', **called)
                shape = (width, expansion, strides if b == 0 else 1)
                x = block(*shape, here, next(rates), name=name)(x, train=train)
                x = here.at('after_block', x, name=f'{name}_after_block_attention', **called)
                x = here.at('stage', x, name=f'{name}_stage_attention', **called)
            stages[f'stage{stage}'] = x

        x = conv(self._scaled(self.features, max(1.0, self.width)), (1, 1), name='features_conv')(x)
        x = jax.nn.relu6(norm(name='features_norm')(x, train=train))
        x = stages['pre_logits'] = functional.spatial_mean(x).astype(x.dtype)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            head = {'kernel_init': head_init, 'bias_init': initializers.zeros, **types}
            x = Dense(self.num_classes, name='head', **head)(x)
        return (x, stages) if return_stages else x

    def _scaled(self, channels: int, width: float) -> int:
        """`channels` times `width`, rounded."""
        if self.width_divisor is None:
            return max(1, int(channels * width))
        return round_to_multiple(channels * width, self.width_divisor, guard=True)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 to `features`; then the sum.

    The last 1x1 has no activation. The input is added where neither stride nor width changes.

    Attributes:
        features: output width.
        expansion: of the channels; at 1 the first convolution is left out.
        strides: of the depthwise convolution.
        attention: the mechanism at the places of this block.
        drop_path_rate: probability that the branch is dropped in training.
        conv: builds a convolution, given features, window and a name.
        depthwise: builds the depthwise one, given features, groups, strides and a name.
        norm: builds a norm, given a name.
    """

    features: int
    expansion: int
    strides: int
    attention: Mechanism
    drop_path_rate: float
    conv: Callable[..., nn.Module]
    depthwise: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the block to `[..., h, w, c]`."""
        attend = functools.partial(self.attention.at, parent=self, train=train)
        c = x.shape[-1]
        inner = c * self.expansion
        y = x
        if self.expansion != 1:
            y = self.conv(inner, (1, 1), name='expand_conv')(y)
            y = jax.nn.relu6(self.norm(name='expand_norm')(y, train=train))
        y = self.depthwise(inner, groups=inner, strides=self.strides, name='depthwise_conv')(y)
        y = attend('depthwise_pre_norm', y)
        y = jax.nn.relu6(self.norm(name='depthwise_norm')(y, train=train))
        y = attend('expanded', y)
        y = self.conv(self.features, (1, 1), name='project_conv')(y)
        y = attend('output', self.norm(name='project_norm')(y, train=train))
        if self.strides != 1 or c != self.features:
            return y
        return x + StochasticDepth(self.drop_path_rate)(y, train=train)
