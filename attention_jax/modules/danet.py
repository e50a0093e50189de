"""Dual attention of DANet: over positions, over channels, and the segmentation head of both."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax import checks
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import BatchNorm, Conv, Dense
from attention_jax.modules.maps import sow_map
from attention_jax.modules.positions import add_gained
from attention_jax.modules.registry import ForeignName, TorchName, pointwise, register_attention
from attention_jax.modules.self_attention import SelfAttention
from attention_jax.modules.widths import hidden_width


class PositionAttention(SelfAttention):
    """Position attention: every position gathers from every other, unscaled.

    With the n positions of x `[..., h, w, c]` and d the hidden width::

        q = x Wq + bq          k = x Wk + bk          v = x Wv + bv       Wq, Wk [c, d], Wv [c, c]
        A = softmax_m(q k^T)                  [..., n, n]
        out = x + gamma A v                   gamma [1], 0 at the start

    It is `SelfAttention` with its defaults, fields and names. bk adds a constant to each row of
    logits, so its gradient is zero, and while gamma is 0 no other parameter has one.

    Source: Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR
    2019, arXiv 1809.02983, eq. 1-2; defaults from the authors' code (junfu1115/DANet
    encoding/nn/da_att.py, `PAM_Module`). The paper's text gives q and k all c channels; neither
    scales the logits, and trained weights depend on that. Projections start as PyTorch's do.
    """


class ChannelAffinityAttention(nn.Module):
    """Channel attention of DANet: every channel gathers from the channels that differ from it.

    With x `[..., h, w, c]` and s = -1, or 1 for similarity 'dot'::

        E_ij = sum_hw x_i x_j                 [..., c, c]    Gram matrix
        A = softmax_j(s E)                    [..., c, c]
        out_i = x_i + gamma sum_j A_ij x_j    gamma [1], 0 at the start

    E is a sum over all positions of products of raw features: its rows span hundreds and A is
    close to one-hot. So E is summed and kept in float32 at the highest precision of the device.

    Source: Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR
    2019, arXiv 1809.02983; defaults from the authors' code (junfu1115/DANet
    encoding/nn/da_att.py, `CAM_Module`): its energy is the maximum of a row minus E, which in the
    softmax is -E, so that the most dissimilar channels weigh most. The paper's eq. 3 prints
    softmax(E), similarity 'dot', where a channel mostly sees itself.

    Attributes:
        similarity: 'negative_dot' (released) or 'dot' (printed).
        dtype: type of the computation; None is the input's. E and the softmax are float32.
        param_dtype: type of the parameters.
    """

    similarity: str = 'negative_dot'
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to each channel of x `[..., h, w, c]` what it gathers from all."""
        checks.feature_map(x)
        checks.choice('similarity', self.similarity, ('negative_dot', 'dot'))
        x = x.astype(self.dtype or x.dtype)
        # Height and width stay two axes: folded into one, a TPU copies the whole tensor.
        energy = contract('...hwi,...hwj->...ij', x, x, precision='highest')
        weights = jax.nn.softmax(energy if self.similarity == 'dot' else -energy)
        sow_map(self, lambda: weights)
        y = contract('...ij,...hwj->...hwi', weights.astype(x.dtype), x)
        return add_gained(self, x, y.astype(x.dtype))


class DANetHead(nn.Module):
    """Segmentation head of DANet: position and channel attention side by side.

    With x `[..., h, w, c]`, r = c / reduction and `block(y) = relu(norm(conv3x3(y)))`, four blocks
    of r features with weights of their own::

        s_p = block(pam(block(x)))                 [..., h, w, r]    `PositionAttention`
        s_c = block(cam(block(x)))                 [..., h, w, r]    `ChannelAffinityAttention`
        logits, logits_p, logits_c = drop(s_p + s_c) W + b, drop(s_p) Wp + bp, drop(s_c) Wc + bc

    drop takes whole feature maps out, of each of the three at its own. Evaluation uses the first
    logits, resized to the image bilinearly with corners aligned; training adds the cross-entropies
    of all three. Maps: those of its two attentions.

    Source: Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR
    2019, arXiv 1809.02983; the authors' code (junfu1115/DANet encoding/models/sseg/danet.py,
    `DANetHead`), on a dilated ResNet of output stride 8. All layers start as PyTorch's do.

    Attributes:
        num_classes: number of classes.
        reduction: divisor of the channels that gives r, rounded down.
        dropout_rate: share of the feature maps taken out in training.
        dtype: type of the computation; None is the input's.
        param_dtype: type of the parameters.
    """

    num_classes: int
    reduction: int = 4
    dropout_rate: float = 0.1
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Classifies every position of x `[..., h, w, c]` three times.

        Training takes its dropout from the random stream 'dropout'.

        Returns:
            Logits of both, of position and of channel attention, `[..., h, w, num_classes]` each.
        """
        checks.feature_map(x)
        checks.at_least('num_classes', self.num_classes, 1)
        checks.rate('dropout_rate', self.dropout_rate)
        r = hidden_width(x.shape[-1], reduction=self.reduction)
        x = x.astype(self.dtype or x.dtype)
        types = {'param_dtype': self.param_dtype}

        block = functools.partial(_ConvNorm, r, **types)
        position = block(name='position_in')(x, train)
        position = PositionAttention(**types, name='position')(position)
        position = block(name='position_out')(position, train)
        channel = block(name='channel_in')(x, train)
        channel = ChannelAffinityAttention(**types, name='channel')(channel)
        channel = block(name='channel_out')(channel, train)

        def classify(features: jax.Array, name: str) -> jax.Array:
            drop = nn.Dropout(self.dropout_rate, broadcast_dims=(-3, -2))
            kept = drop(features, deterministic=not train)
            return Dense(self.num_classes, **types, name=name)(kept)

        return (
            classify(position + channel, 'fused_logits'),
            classify(position, 'position_logits'),
            classify(channel, 'channel_logits'),
        )


class _ConvNorm(nn.Module):
    """`relu(norm(conv3x3(x)))`, no bias."""

    features: int
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        types = {'param_dtype': self.param_dtype}
        x = Conv(self.features, (3, 3), use_bias=False, **types, name='conv')(x)
        return jax.nn.relu(BatchNorm(**types, name='norm')(x, train=train))


_PAPER = {
    'paper': 'Dual Attention Network for Scene Segmentation',
    'arxiv': '1809.02983',
    'year': 2019,
}
_POSITION_NAMES: dict[ForeignName, TorchName] = {
    **pointwise({'query_conv': 'query', 'key_conv': 'key', 'value_conv': 'value'}),
    'gamma': 'gamma',
}
_CHANNEL_NAMES: dict[ForeignName, TorchName] = {'gamma': 'gamma'}

register_attention(
    'pam',
    PositionAttention,
    **_PAPER,
    family='positions',
    complexity='N^2 C + N C^2',
    identity_at_init=True,
    variants={'authors': {}},
    torch_names={'authors': _POSITION_NAMES},
)
register_attention(
    'cam',
    ChannelAffinityAttention,
    **_PAPER,
    family='channel',
    complexity='N C^2',
    identity_at_init=True,
    variants={'authors': {}, 'paper': {'similarity': 'dot'}},
    torch_names={'authors': _CHANNEL_NAMES},
)
register_attention(
    'danet_head',
    DANetHead,
    **_PAPER,
    family='mixed',
    complexity='N^2 C + N C^2 k^2',
    preserves_shape=False,
    placement='none',
    example=lambda shape: {'num_classes': 21},
    torch_names={
        'authors': {
            'conv5a.0.*': 'position_in/conv/*',
            'conv5a.1.*': 'position_in/norm/*',
            'conv5c.0.*': 'channel_in/conv/*',
            'conv5c.1.*': 'channel_in/norm/*',
            'sa.**': ('position/**', _POSITION_NAMES),
            'sc.**': ('channel/**', _CHANNEL_NAMES),
            'conv51.0.*': 'position_out/conv/*',
            'conv51.1.*': 'position_out/norm/*',
            'conv52.0.*': 'channel_out/conv/*',
            'conv52.1.*': 'channel_out/norm/*',
            **pointwise(
                {
                    'conv6.1': 'position_logits',
                    'conv7.1': 'channel_logits',
                    'conv8.1': 'fused_logits',
                }
            ),
        }
    },
)
