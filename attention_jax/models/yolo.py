"""YOLOv4-tiny, with any mechanism in its neck; and its named forms."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.models import placement as placements
from attention_jax.models.attach import Mechanism, mechanism_names
from attention_jax.models.darknet import (
    INITIALIZATIONS,
    STRIDE,
    TORCH_NAMES,
    ConvNorm,
    CSPDarknet,
    check_width,
    scaled,
)
from attention_jax.models.registry import register_described
from attention_jax.modules.layers import Conv
from attention_jax.modules.registry import ForeignName, TorchName, TorchNames

# Width and height in pixels of images of 416 x 416.
ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
# The anchors of stride 32 and of stride 16: number 3 is in both, number 0 in none.
MASKS = ((3, 4, 5), (1, 2, 3))
_BOX = 5  # x, y, w, h and the object's logit stand before the classes


class YOLOv4Tiny(nn.Module):
    """YOLOv4-tiny (Wang et al. 2020, arXiv 2011.08036) with any mechanism in its neck.

    With r3 and r1 for convolutions of 3x3 and 1x1 with batch norm and leaky ReLU (slope 0.1), A for
    the mechanism, c for convolutions of 1x1 with a bias, widths at `width` 1::

        feat1, feat2 = backbone(x)          [b, h/16, w/16, 256], [b, h/32, w/32, 512]
        p = r1(A(feat2))                    [b, h/32, w/32, 256]
        out32 = c(r3(p))                    [b, h/32, w/32, 3 (5 + classes)], 512 channels between
        u = A(upsample_2x(r1(p)))           [b, h/16, w/16, 128], nearest
        out16 = c(r3([u, A(feat1)]))        [b, h/16, w/16, 3 (5 + classes)], 256 channels between

    The channels of an output are (anchor, [x, y, w, h, object, classes...]), all before any
    activation; `tasks.detection.yolo` decodes them. A is never inside the backbone, so its weights
    fit with every mechanism.

    Source: bubbliiiing/yolov4-tiny-pytorch nets/yolo.py. As its training from nothing does, kernels
    start from N(0, 0.02) and the norms' scales from N(1, 0.02), those of the backbone too; the
    heads' biases as PyTorch's layers do. (It starts the convolutions inside A so as well; here A
    starts as it does elsewhere.)

    Attributes:
        width: multiplies every width but that of the outputs, rounded to a multiple of 8.
        attention: registry name of a mechanism that keeps its input's shape, or None.
        placement: where it sits: keys of `models.placement.NECK`, joined by `+`; None is
            'feat1+feat2+upsampled'.
        attention_args: its arguments: a mapping, or a sequence of one mapping a place, in the order
            of `placement`.
        identity_init: a mechanism that does not start as the identity is made to
            (`models.attach`).
        num_classes: number of classes; 0 drops neck and heads and returns the backbone's maps.
        anchors: (width, height) of boxes in pixels.
        masks: for stride 32 and for stride 16 the numbers of its anchors, counted from 0.
        image_size: height and width that its outputs are decoded with, multiples of 32; the network
            takes any size.
        dtype: type of the computation; None is the input's. Norm statistics are float32.
        param_dtype: type of the parameters.
    """

    width: float = 1.0
    attention: str | None = None
    placement: str | None = None
    attention_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    identity_init: bool = False
    num_classes: int = 20
    anchors: Sequence[Sequence[float]] = ANCHORS
    masks: Sequence[Sequence[int]] = MASKS
    image_size: Sequence[int] = (416, 416)
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        """Refuses arguments that no input could make right."""
        super().__post_init__()
        check_width(self.width)
        checks.at_least('num_classes', self.num_classes, 0)
        pairs = np.ndim(self.anchors) == 2 and np.shape(self.anchors)[1] == 2
        if not pairs or not all(min(a) > 0 for a in self.anchors):
            raise ValueError(
                f'anchors must be pairs (width, height) of positive pixels, got {self.anchors}'
            )
        if len(self.masks) != 2 or not all(np.ndim(mask) == 1 and len(mask) for mask in self.masks):
            raise ValueError(
                f'masks must be two sequences of anchors, of stride 32 and of stride 16, got '
                f'{self.masks}'
            )
        if not all(0 <= n < len(self.anchors) for mask in self.masks for n in mask):
            raise ValueError(
                f'masks must hold numbers of anchors, 0 to {len(self.anchors) - 1}, got '
                f'{self.masks}'
            )
        if np.shape(self.image_size) != (2,) or not min(self.image_size) > 0:
            raise ValueError(f'image_size must be height and width, got {self.image_size}')
        _check_sides('image_size', *self.image_size)
        self.sites()

    def sites(self) -> placements.Sites:
        """Where the mechanism stands, with its arguments there, as `models.placement` says it."""
        return placements.resolve_neck(self.attention, self.placement, self.attention_args)

    def classes_of(self, outputs: int) -> int | None:
        """Number of classes of a head with this many outputs; None if it can be none of this's."""
        for mask in self.masks:
            per_anchor, rest = divmod(outputs, len(mask))
            if rest == 0 and per_anchor > _BOX:
                return per_anchor - _BOX
        return None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, return_stages: bool = False
    ) -> list[jax.Array] | tuple[list[jax.Array], dict[str, jax.Array]]:
        """Predicts boxes on two grids.

        Args:
            x: `[b, h, w, c]`, values in 0 to 1, h and w multiples of 32, any number of channels.
            train: uses the batch's statistics.
            return_stages: returns a pair, of the outputs and a dict: the backbone's stages, of
                which `feat1` and `feat2` are what the mechanism makes of them, `neck` (p) and
                `upsampled` (u).

        Returns:
            The outputs of stride 32 and 16, of the computation's type; `feat2` and `feat1` of the
            backbone where there are no classes.

        Raises:
            ValueError: sides that are no multiples of 32, or what the mechanism refuses.
        """
        checks.feature_map(x)
        _check_sides('x', *x.shape[-3:-1])
        types = {'param_dtype': self.param_dtype}
        layer = functools.partial(ConvNorm, initialization='normal', **types)
        places = self.sites().get('neck', {}) if self.num_classes else {}
        here = Mechanism(self.attention, types, self.identity_init, places)

        def attend(place: str, x: jax.Array) -> jax.Array:
            return here.at(place, x, parent=self, train=train, name=f'{place}_attention')

        def conv(x: jax.Array, name: str, features: int, window: int) -> jax.Array:
            return layer(scaled(features, self.width), window, name=name)(x, train=train)

        def head(x: jax.Array, stride: int, features: int, anchors: int) -> jax.Array:
            x = conv(x, f'head{stride}_conv', features, 3)
            outputs = anchors * (_BOX + self.num_classes)
            kernel_init = INITIALIZATIONS['normal'][0]
            return Conv(outputs, (1, 1), kernel_init=kernel_init, name=f'head{stride}', **types)(x)

        x = x.astype(self.dtype or x.dtype)
        backbone = CSPDarknet(self.width, initialization='normal', name='backbone', **types)
        stages = backbone(x, train=train, return_stages=True)[1]
        feat1 = stages['feat1'] = attend('feat1', stages['feat1'])
        feat2 = stages['feat2'] = attend('feat2', stages['feat2'])
        outputs = [feat2, feat1]
        if self.num_classes:
            neck = stages['neck'] = conv(feat2, 'neck', 256, 1)
            up = functional.upsample(conv(neck, 'upsample', 128, 1), 2)
            up = stages['upsampled'] = attend('upsampled', up)
            of32, of16 = map(len, self.masks)
            joined = jnp.concatenate([up, feat1], -1)
            outputs = [head(neck, 32, 512, of32), head(joined, 16, 256, of16)]
        return (outputs, stages) if return_stages else outputs


def _check_sides(name: str, h: int, w: int) -> None:
    """Raises a ValueError unless both sides are multiples of the network's stride."""
    if h % STRIDE or w % STRIDE:
        raise ValueError(
            f'{name} has {h} x {w} pixels, YOLOv4-tiny needs multiples of {STRIDE}: resize or pad '
            f'it to {-(-h // STRIDE) * STRIDE} x {-(-w // STRIDE) * STRIDE}'
        )


# Names in PyTorch.

# The repository's mechanisms: a scheme of the mechanism's own, or names that are only here.
_REPOSITORY: dict[str, str | Mapping[ForeignName, TorchName]] = {
    'se': 'article',
    'cbam': {
        'channelattention.fc1.*': ('channel/fc1/*', 'o i 1 1 -> i o'),
        'channelattention.fc2.*': ('channel/fc2/*', 'o i 1 1 -> i o'),
        'spatialattention.conv1.*': 'spatial/conv/*',
    },
    'eca': 'authors',
    'coordinate': 'yolov4_tiny',
}


def torch_names(network: YOLOv4Tiny) -> TorchNames:
    """Names of weights in the PyTorch YOLOv4-tiny, with each of the mechanism's schemes.

    'backbone' is the backbone alone, or the classifier that it was; without classes all is so.
    """
    unused = dict.fromkeys(('fc.weight', 'fc.bias'))
    alone = {'backbone': {'**': ('backbone/**', TORCH_NAMES), **unused}}
    if not network.num_classes:
        return alone
    names: dict[ForeignName, TorchName] = {
        'backbone.**': ('backbone/**', TORCH_NAMES),
        'yolo_headP5.1.*': 'head32/*',
        'yolo_headP4.1.*': 'head16/*',
    }
    for theirs, ours in (
        ('conv_for_P5', 'neck'),
        ('yolo_headP5.0', 'head32_conv'),
        ('upsample.upsample.0', 'upsample'),
        ('yolo_headP4.0', 'head16_conv'),
    ):
        names[f'{theirs}.conv.*'] = f'{ours}/conv/*'
        names[f'{theirs}.bn.*'] = f'{ours}/norm/*'
    sites = network.sites()
    if not sites:
        return {'yolov4_tiny': names, **alone}
    tables = dict(mechanism_names(network.attention, sites))
    repository = _REPOSITORY.get(network.attention)
    if isinstance(repository, str):
        tables = {repository: tables[repository]} | tables
    elif repository:
        tables = {'yolov4_tiny': repository} | tables
    parts = {'feat1': 'feat1_att', 'feat2': 'feat2_att', 'upsampled': 'upsample_att'}
    schemes = {
        f'yolov4_tiny.{scheme}': names
        | {f'{parts[place]}.**': (f'{place}_attention/**', table) for place in sites['neck']}
        for scheme, table in tables.items()
    }
    return {**schemes, **alone}


# The named networks. `phi` is the repository's number of a mechanism.
_SE = {'use_bias': False}
_CBAM = {'reduction': 8, 'mlp_bias': False, 'pool_order': 'mean_max', 'conv_norm': False}
_ECA = {'kernel_size': None}
_COORDINATE = {'reduction': 16, 'min_hidden': 1, 'use_bias': False, 'activation': 'relu'}


def _network(name: str, num_classes: int, **description: Any) -> None:
    register_described(
        YOLOv4Tiny,
        name,
        {'num_classes': num_classes, **description},
        family='yolo',
        paper='arXiv 2011.08036',
        input_size=(416, 416),
        torch_names=torch_names,
        task='detection',
        preprocessing='pixels',
    )


_network('yolov4_tiny', 20)
_network('yolov4_tiny_voc_phi0', 20)
_network('yolov4_tiny_voc_phi1', 20, attention='se', attention_args=_SE)
_network('yolov4_tiny_voc_phi2', 20, attention='cbam', attention_args=_CBAM)
_network('yolov4_tiny_voc_phi3', 20, attention='eca', attention_args=_ECA)
_network('yolov4_tiny_voc_phi4', 20, attention='coordinate', attention_args=_COORDINATE)
_network('yolov4_tiny_coco_phi0', 80)
_network('yolov4_tiny_coco_phi1', 80, attention='se', attention_args=_SE)
_network('yolov4_tiny_coco_phi2', 80, attention='cbam', attention_args=_CBAM)
_network('yolov4_tiny_coco_phi3', 80, attention='eca', attention_args=_ECA)
_network('yolov4_tiny_coco_phi4', 80, attention='coordinate', attention_args=_COORDINATE)
