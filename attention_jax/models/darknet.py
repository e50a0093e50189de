"""CSPDarknet53-tiny: the backbone of YOLOv4-tiny, and a small classifier."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.models.registry import create_described, register_model
from attention_jax.modules.initializers import Initializer, kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Conv, Dense
from attention_jax.modules.registry import ForeignName, TorchName
from attention_jax.modules.widths import round_to_multiple

STRIDE = 32


def scale_near_one(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """The scales of norms that start from N(1, 0.02)."""
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


# Of convolutions and of the norms' scales.
INITIALIZATIONS: dict[str, tuple[Initializer, Initializer]] = {
    'fan_out': (kaiming_fan_out, initializers.ones),
    'normal': (initializers.normal(0.02), scale_near_one),
}


class CSPDarknet(nn.Module):
    """CSPDarknet53-tiny, the backbone of YOLOv4-tiny (Wang et al. 2020, arXiv 2011.08036).

    Two 3x3 convolutions of stride 2, three blocks (`CSPBlock`) of 64, 128 and 256 channels, each of
    which halves the map and doubles the channels, and a 3x3 convolution of 512. All have a batch
    norm and a leaky ReLU of slope 0.1. Its two results are called `feat1`, 256 channels at stride
    16 inside the third block, and `feat2`, 512 at stride 32.

    Source: the form of bubbliiiing/yolov4-tiny-pytorch nets/CSPdarknet53_tiny.py, which is that of
    AlexeyAB/darknet cfg/yolov4-tiny.cfg. Neither has a head: that one is a mean over positions and
    a linear layer.

    Attributes:
        width: multiplies every width, rounded to a multiple of 8.
        num_classes: width of the head; 0 drops it and returns the pooled features.
        initialization: of kernels and scales: 'fan_out', N(0, 2 / (k * k * c_out)) and 1 (its own
            code), or 'normal', N(0, 0.02) and N(1, 0.02) (training of YOLOv4-tiny).
        dtype: type of the computation; None is the input's. Norm statistics are float32.
        param_dtype: type of the parameters.
    """

    width: float = 1.0
    num_classes: int = 0
    initialization: str = 'fan_out'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Refuses arguments that no input could make right."""
        super().__post_init__()
        checks.choice('initialization', self.initialization, INITIALIZATIONS)
        checks.at_least('num_classes', self.num_classes, 0)
        check_width(self.width)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Logits `[b, num_classes]` of images, or pooled features `[b, c]` without a head.

        Args:
            x: `[b, h, w, c]`, any number of channels.
            train: uses the batch's statistics.
            return_stages: returns a pair, of the above and a dict: `stem`, `stage1` to `stage3`,
                `feat1`, `feat2` `[b, h', w', c']`, and `pre_logits` `[b, c]`.

        Raises:
            ValueError: an image smaller than the network's stride.
        """
        checks.feature_map(x)
        checks.covers_stride(x, STRIDE)
        conv = functools.partial(
            ConvNorm, initialization=self.initialization, param_dtype=self.param_dtype
        )
        x = x.astype(self.dtype or x.dtype)
        x = conv(scaled(32, self.width), 3, 2, name='conv1')(x, train=train)
        x = conv(scaled(64, self.width), 3, 2, name='conv2')(x, train=train)
        stages = {'stem': x}
        for i, channels in enumerate((64, 128, 256), 1):
            block = CSPBlock(scaled(channels, self.width), conv, name=f'block{i}')
            x, stages['feat1'] = block(x, train=train)
            stages[f'stage{i}'] = x
        x = stages['feat2'] = conv(scaled(512, self.width), 3, name='conv3')(x, train=train)
        x = stages['pre_logits'] = functional.spatial_mean(x).astype(x.dtype)
        if self.num_classes:
            x = Dense(self.num_classes, param_dtype=self.param_dtype, name='head')(x)
        return (x, stages) if return_stages else x


class CSPBlock(nn.Module):
    """Two convolutions on half of the channels, beside the whole, then half the map.

    With c = `features`, r3 and r1 for convolutions of 3x3 and 1x1 with norm and activation::

        y = r3(x)                                [..., h, w, c]
        u = r3(y[..., c / 2:])                   [..., h, w, c / 2]
        feat = r1([r3(u), u])                    [..., h, w, c]
        out = max_pool_2x2([y, feat])            [..., h / 2, w / 2, 2 c]

    Attributes:
        features: c, even.
        conv: builds a `ConvNorm`, given features, window and a name.
    """

    features: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Applies the block to `[..., h, w, c']`; returns `out` and `feat`."""
        half = self.features // 2
        whole = self.conv(self.features, 3, name='conv1')(x, train=train)
        first = self.conv(half, 3, name='conv2')(whole[..., half:], train=train)
        second = self.conv(half, 3, name='conv3')(first, train=train)
        both = jnp.concatenate([second, first], -1)
        feat = self.conv(self.features, 1, name='conv4')(both, train=train)
        # Pooled before they are joined, which copies a quarter of the values.
        out = jnp.concatenate([functional.max_pool(y, 2) for y in (whole, feat)], -1)
        return out, feat


class ConvNorm(nn.Module):
    """Convolution without a bias, batch norm, leaky ReLU of slope 0.1.

    Attributes:
        features: output width.
        window: side of the square window, odd.
        strides: along both sides.
        initialization: key of `INITIALIZATIONS`.
        param_dtype: type of the parameters.
    """

    features: int
    window: int
    strides: int = 1
    initialization: str = 'fan_out'
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the layers to `[..., h, w, c]`."""
        kernel_init, scale_init = INITIALIZATIONS[self.initialization]
        x = Conv(
            self.features,
            (self.window, self.window),
            strides=self.strides,
            use_bias=False,
            kernel_init=kernel_init,
            param_dtype=self.param_dtype,
            name='conv',
        )(x)
        norm = BatchNorm(scale_init=scale_init, param_dtype=self.param_dtype, name='norm')
        return jax.nn.leaky_relu(norm(x, train=train), 0.1)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, so that half of it is even."""
    return round_to_multiple(channels * width, 8)


def check_width(width: float) -> None:
    """Raises a ValueError unless the multiplier of the widths is positive."""
    if not width > 0:
        raise ValueError(f'width must be positive, got {width}')


def _torch_names() -> dict[ForeignName, TorchName]:
    """Names of weights in the PyTorch backbone; the head, which it lacks, is called `fc`."""
    layers = {f'conv{i}': f'conv{i}' for i in (1, 2, 3)} | {
        f'resblock_body{b}.conv{i}': f'block{b}/conv{i}' for b in (1, 2, 3) for i in (1, 2, 3, 4)
    }
    names: dict[ForeignName, TorchName] = {'fc.*': 'head/*'}
    for theirs, ours in layers.items():
        names[f'{theirs}.conv.*'] = f'{ours}/conv/*'
        names[f'{theirs}.bn.*'] = f'{ours}/norm/*'
    return names


TORCH_NAMES = _torch_names()


def _build(num_classes: int | None = 0, **arguments: Any) -> CSPDarknet:
    """Builds the network; None is 0 classes."""
    return create_described(CSPDarknet, {}, num_classes=num_classes or 0, **arguments)


register_model(
    'darknet53_tiny',
    _build,
    family='darknet',
    paper='arXiv 2011.08036',
    input_size=(416, 416),
    num_classes=0,
    preprocessing='pixels',
    torch_names={'yolov4_tiny': TORCH_NAMES},
)
