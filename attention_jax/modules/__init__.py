"""The mechanisms, one file each; importing this package registers them all.

A mechanism is called as `module(x, train=False)` with x `[..., h, w, c]`, and returns the same
shape and type unless its class says otherwise; without statistics and dropout `train` changes
nothing. A field that is not allowed, or an x that is no map, is a ValueError at the first call,
which names what was given and what is allowed.
"""

from attention_jax.modules.bam import BAM
from attention_jax.modules.cbam import CBAM, CBAMChannel, CBAMSpatial
from attention_jax.modules.cgnl import CGNL
from attention_jax.modules.coordinate import CoordinateAttention
from attention_jax.modules.criss_cross import CrissCrossAttention
from attention_jax.modules.cross_layer_non_local import CrossLayerNonLocal
from attention_jax.modules.danet import ChannelAffinityAttention, DANetHead, PositionAttention
from attention_jax.modules.double_attention import DoubleAttention
from attention_jax.modules.downsampled_self_attention import DownsampledSelfAttention
from attention_jax.modules.eca import EfficientChannelAttention
from attention_jax.modules.ese import EffectiveSqueezeExcite
from attention_jax.modules.external_attention import ExternalAttention, MultiHeadExternalAttention
from attention_jax.modules.gc import GlobalContext
from attention_jax.modules.gsop import GlobalSecondOrderPooling
from attention_jax.modules.isqrt_cov import IterativeSqrtCovariancePooling
from attention_jax.modules.non_local import NonLocal
from attention_jax.modules.pyramid_self_attention import PyramidSelfAttention
from attention_jax.modules.qkv import QKVAttention
from attention_jax.modules.se import SqueezeExcite
from attention_jax.modules.self_attention import SelfAttention
from attention_jax.modules.simam import SimAM
from attention_jax.modules.sk import SelectiveKernel
from attention_jax.modules.split_attention import SplitAttention
from attention_jax.modules.triplet import TripletAttention

__all__ = [
    'BAM',
    'CBAM',
    'CGNL',
    'CBAMChannel',
    'CBAMSpatial',
    'ChannelAffinityAttention',
    'CoordinateAttention',
    'CrissCrossAttention',
    'CrossLayerNonLocal',
    'DANetHead',
    'DoubleAttention',
    'DownsampledSelfAttention',
    'EffectiveSqueezeExcite',
    'EfficientChannelAttention',
    'ExternalAttention',
    'GlobalContext',
    'GlobalSecondOrderPooling',
    'IterativeSqrtCovariancePooling',
    'MultiHeadExternalAttention',
    'NonLocal',
    'PositionAttention',
    'PyramidSelfAttention',
    'QKVAttention',
    'SelectiveKernel',
    'SelfAttention',
    'SimAM',
    'SplitAttention',
    'SqueezeExcite',
    'TripletAttention',
]
