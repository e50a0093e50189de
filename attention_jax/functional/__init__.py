"""Arrays in, arrays out: the mathematics of attention and its fast lowerings.

No parameters and no Flax here. Every function takes any leading batch axes; softmax, statistics and
sums are computed in float32 (float64 if the input is) and returned in the input's type.
"""

from attention_jax.functional.branches import branch_mean, branch_softmax
from attention_jax.functional.channel_product import channel_weights, mix_channels
from attention_jax.functional.contract import contract
from attention_jax.functional.conv import conv, dense
from attention_jax.functional.criss_cross import criss_cross_attend, criss_cross_weights
from attention_jax.functional.dot_product import (
    additive_attend,
    attend,
    attention_weights,
)
from attention_jax.functional.memory import read_memory
from attention_jax.functional.pairwise import pairwise_relu_attend
from attention_jax.functional.pooling import (
    adaptive_avg_pool,
    avg_pool,
    axis_mean_and_max,
    channel_mean_and_max,
    max_pool,
    spatial_mean,
    spatial_mean_and_max,
)
from attention_jax.functional.resize import upsample

__all__ = [
    'adaptive_avg_pool',
    'additive_attend',
    'attend',
    'attention_weights',
    'avg_pool',
    'axis_mean_and_max',
    'branch_mean',
    'branch_softmax',
    'channel_mean_and_max',
    'channel_weights',
    'contract',
    'conv',
    'criss_cross_attend',
    'criss_cross_weights',
    'dense',
    'max_pool',
    'mix_channels',
    'pairwise_relu_attend',
    'read_memory',
    'spatial_mean',
    'spatial_mean_and_max',
    'upsample',
]
