"""The mechanisms in PyTorch, as a user of PyTorch would have them: what `benchmark` compares with.

Each class is a mechanism with its default arguments, written from its equation, with the parameters
named as its authors name them, so that `attention_jax.interop.torch.to_state_dict` fills it. Where
timm has the same computation, timm's module is taken instead. Maps are `[b, c, h, w]`.

Attention over positions is two matrix products with a softmax between, as in the authors' code.
"""

# ruff: noqa: D101, D102  (a class here is its equation, and the mechanism it is named after)

import copy
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_jax.interop.torch import to_state_dict
from attention_jax.modules.registry import attention_entry

# Channels.


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(y))))


class EffectiveSqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class EfficientChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3))[:, None])
        return x * torch.sigmoid(y)[:, 0, :, None, None]


class GlobalSecondOrderPooling(nn.Module):
    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.conv_for_DR = nn.Conv2d(channels, hidden, 1)
        self.bn_for_DR = nn.BatchNorm2d(hidden)
        self.row_bn = nn.BatchNorm2d(hidden)
        self.row_conv_group = nn.Conv2d(hidden, 4 * hidden, (hidden, 1), groups=hidden)
        self.fc_adapt_channels = nn.Conv2d(4 * hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn_for_DR(self.conv_for_DR(F.relu(x))))
        rows = self.row_bn(covariance(z)[..., None])
        gate = self.fc_adapt_channels(self.row_conv_group(rows))
        return x * torch.sigmoid(gate)


class IterativeSqrtCovariancePooling(nn.Module):
    def __init__(self, channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.conv_dr_block = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        s = covariance(self.conv_dr_block(x))
        d = s.shape[-1]
        eye = torch.eye(d, dtype=s.dtype, device=s.device)
        trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        y, z = s / trace, eye.expand_as(s)
        for _ in range(5):
            t = (3 * eye - z @ y) / 2
            y, z = y @ t, t @ z
        i, j = torch.triu_indices(d, d, device=s.device)
        return (trace.sqrt() * y)[:, i, j]


def covariance(z: Tensor) -> Tensor:
    """Covariance `[b, d, d]` of the channels of `[b, d, h, w]` over positions."""
    z = z.flatten(2)
    z = z - z.mean(2, keepdim=True)
    return z @ z.transpose(1, 2) / z.shape[2]


class SelectiveKernel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def branch(dilation: int) -> nn.Module:
            path = nn.Sequential()
            kwargs: dict[str, Any] = {'padding': dilation, 'dilation': dilation, 'bias': False}
            path.add_module('conv', nn.Conv2d(channels, channels, 3, groups=32, **kwargs))
            path.add_module('bn', nn.BatchNorm2d(channels))
            path.add_module('act', nn.ReLU())
            return path

        hidden = max(channels // 16, 32)
        self.paths = nn.ModuleList([branch(1), branch(2)])
        self.attn = nn.Module()
        self.attn.fc_reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.attn.bn = nn.BatchNorm2d(hidden)
        self.attn.fc_select = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.stack([path(x) for path in self.paths], 1)
        s = u.sum(1).mean((2, 3), keepdim=True)
        z = F.relu(self.attn.bn(self.attn.fc_reduce(s)))
        a = self.attn.fc_select(z).unflatten(1, (2, -1)).softmax(1)
        return (u * a).sum(1)


class SplitAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels * 2 // 4, 32)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn0(self.conv(x))).unflatten(1, (2, -1))
        s = u.sum(1).mean((2, 3), keepdim=True)
        z = F.relu(self.bn1(self.fc1(s)))
        return (u * self.fc2(z).unflatten(1, (2, -1)).softmax(1)).sum(1)


# Gates of channels and positions.


class CBAMChannel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        return x * torch.sigmoid(gate)[:, :, None, None]


class PlaneGate(nn.Module):
    """The gate of CBAM and Triplet: maximum and mean over channels, 7x7, norm, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.bn(self.conv(z)))


class CBAMSpatial(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = PlaneGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(x)


class CBAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ChannelGate = CBAMChannel(channels)
        self.SpatialGate = CBAMSpatial(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class CoordinateAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 32)
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv_h = nn.Conv2d(hidden, channels, 1)
        self.conv_w = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        y = F.hardswish(self.bn1(self.conv1(torch.cat([rows, columns], 2))))
        rows, columns = y.split([x.shape[2], x.shape[3]], 2)
        gate = torch.sigmoid(self.conv_h(rows))
        return x * gate * torch.sigmoid(self.conv_w(columns.transpose(2, 3)))


class BAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        channel, spatial = nn.Sequential(), nn.Sequential()
        channel.add_module('gate_c_fc_0', nn.Linear(channels, hidden))
        channel.add_module('gate_c_bn_1', nn.BatchNorm1d(hidden))
        channel.add_module('gate_c_relu_1', nn.ReLU())
        channel.add_module('gate_c_fc_final', nn.Linear(hidden, channels))
        spatial.add_module('gate_s_conv_reduce0', nn.Conv2d(channels, hidden, 1))
        spatial.add_module('gate_s_bn_reduce0', nn.BatchNorm2d(hidden))
        spatial.add_module('gate_s_relu_reduce0', nn.ReLU())
        for i in range(2):
            conv = nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)
            spatial.add_module(f'gate_s_conv_di_{i}', conv)
            spatial.add_module(f'gate_s_bn_di_{i}', nn.BatchNorm2d(hidden))
            spatial.add_module(f'gate_s_relu_di_{i}', nn.ReLU())
        spatial.add_module('gate_s_conv_final', nn.Conv2d(hidden, 1, 1))
        self.channel_att, self.spatial_att = nn.Module(), nn.Module()
        self.channel_att.gate_c, self.spatial_att.gate_s = channel, spatial

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel_att.gate_c(x.mean((2, 3)))[:, :, None, None]
        return (1 + torch.sigmoid(channel * self.spatial_att.gate_s(x))) * x


class TripletAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cw, self.hc, self.hw = nn.Module(), nn.Module(), nn.Module()
        for plane in (self.cw, self.hc, self.hw):
            plane.conv = PlaneGate()

    def forward(self, x: Tensor) -> Tensor:
        cw = self.cw.conv(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3)
        hc = self.hc.conv(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1)
        return (self.hw.conv(x) + cw + hc) / 3


# Attention over positions and over channels.


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Attention of `[b, d, n]` over `[b, d, m]`; value `[b, e, m]`; the result is `[b, e, n]`."""
    weights = (scale * query.transpose(1, 2) @ key).softmax(-1)
    return value @ weights.transpose(1, 2)


class SelfAttention(nn.Module):
    """SAGAN's self-attention in its common form; DANet's position attention is the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        projected = (layer(x) for layer in (self.query_conv, self.key_conv, self.value_conv))
        y = attention(*(p.flatten(2) for p in projected))
        return self.gamma * y.view_as(x) + x


class QKVAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        return self.gamma * attention(q, k, v, q.shape[1] ** -0.5).view_as(x) + x


class ChannelAffinityAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2)
        energy = t @ t.transpose(1, 2)
        energy = energy.max(-1, keepdim=True)[0] - energy
        return self.gamma * (energy.softmax(-1) @ t).view_as(x) + x


class DANetHead(nn.Module):
    def __init__(self, channels: int, num_classes: int, dropout_rate: float = 0.1) -> None:
        super().__init__()
        inner = channels // 4

        def block(features: int) -> nn.Module:
            conv = nn.Conv2d(features, inner, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(inner), nn.ReLU())

        def classify() -> nn.Module:
            return nn.Sequential(nn.Dropout2d(dropout_rate), nn.Conv2d(inner, num_classes, 1))

        self.conv5a, self.conv5c = block(channels), block(channels)
        self.sa, self.sc = SelfAttention(inner), ChannelAffinityAttention(inner)
        self.conv51, self.conv52 = block(inner), block(inner)
        self.conv6, self.conv7, self.conv8 = classify(), classify(), classify()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = self.conv51(self.sa(self.conv5a(x)))
        channel = self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)


class NonLocal(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.theta = nn.Conv2d(channels, hidden, 1)
        self.phi = nn.Conv2d(channels, hidden, 1)
        self.g = nn.Conv2d(channels, hidden, 1)
        self.out = nn.Conv2d(hidden, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 2)
        q, k, v = self.theta(x), self.phi(pooled), self.g(pooled)
        y = attention(*(p.flatten(2) for p in (q, k, v)), q.shape[1] ** -0.5)
        return x + self.bn(self.out(y.view_as(q)))


class DownsampledSelfAttention(nn.Module):
    def __init__(self, channels: int, pool_size: int = 8) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        p = F.avg_pool2d(x, self.pool_size)
        q, k, v = (layer(p) for layer in (self.query_conv, self.key_conv, self.value_conv))
        y = attention(*(t.flatten(2) for t in (q, k, v)), q.shape[1] ** -0.5).view_as(p)
        return x + F.interpolate(y, scale_factor=self.pool_size)


class PyramidSelfAttention(nn.Module):
    """For one image a map."""

    def __init__(
        self, channels: int, images: int = 1, scales: Sequence[int] = (1, 2, 4, 8)
    ) -> None:
        super().__init__()
        if images != 1:
            raise ValueError(f'images must be 1, got {images}')
        self.scales = scales
        self.stages = nn.ModuleList()
        for _ in scales:
            level = nn.Module()
            for name in ('f_key', 'f_query'):
                conv = nn.Conv2d(channels, channels // 8, 1)
                level.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(channels // 8)))
            level.f_value = nn.Conv2d(channels, channels, 1)
            self.stages.append(level)
        out = nn.Conv2d(len(scales) * channels, channels, 1, bias=False)
        self.conv_bn = nn.Sequential(out)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for r, level in zip(self.scales, self.stages, strict=True):
            projected = [f(x) for f in (level.f_query, level.f_key, level.f_value)]
            q, k, v = (regions(p, r) for p in projected)
            y = attention(q, k, v, q.shape[1] ** -0.5)
            levels.append(whole(y, r, x.shape))
        return self.conv_bn(torch.cat(levels, 1))


def regions(x: Tensor, r: int) -> Tensor:
    """`[b, c, h, w]` as the positions of each of r x r regions, `[b * r * r, c, n]`."""
    b, c, h, w = x.shape
    return x.view(b, c, r, h // r, r, w // r).permute(0, 2, 4, 1, 3, 5).reshape(b * r * r, c, -1)


def whole(x: Tensor, r: int, shape: Sequence[int]) -> Tensor:
    """The map that `regions` took apart."""
    b, c, h, w = shape
    return x.view(b, r, r, c, h // r, w // r).permute(0, 3, 1, 4, 2, 5).reshape(shape)


class CrossLayerNonLocal(nn.Module):
    """With one further map, of the same channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 8
        self.t = nn.Conv2d(channels, hidden, 1, bias=False)
        self.p0 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.g0 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.z = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = self.t(x)
        projected = (p.flatten(2) for p in (q, self.p0(other), self.g0(other)))
        y = attention(*projected, q.shape[1] ** -0.5).transpose(1, 2)
        # The released code takes positions before channels for channels before positions.
        return x + self.bn0(self.z(y.reshape(q.shape)))


class CGNL(nn.Module):
    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        hidden = channels // 2
        self.groups = groups
        self.t = nn.Conv2d(channels, hidden, 1, bias=False)
        self.p = nn.Conv2d(channels, hidden, 1, bias=False)
        self.g = nn.Conv2d(channels, hidden, 1, bias=False)
        self.z = nn.Conv2d(hidden, channels, 1, groups=groups, bias=False)
        self.gn = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        t = self.t(x)
        p, g = (layer(x).view(x.shape[0], self.groups, -1) for layer in (self.p, self.g))
        a = (p * g).sum(-1, keepdim=True)
        y = (a * t.view_as(p)).view_as(t)
        return x + self.gn(self.z(y))


class CrissCrossAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.once(x)
        return x

    def once(self, x: Tensor) -> Tensor:
        h = x.shape[2]
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        column = torch.einsum('bdij,bdkj->bijk', q, k)
        own = torch.eye(h, dtype=torch.bool, device=x.device)[:, None]
        column = column.masked_fill(own, float('-inf'))
        row = torch.einsum('bdij,bdil->bijl', q, k)
        a = torch.cat([column, row], -1).softmax(-1)
        y = torch.einsum('bijk,bckj->bcij', a[..., :h], v)
        return self.gamma * (y + torch.einsum('bijl,bcil->bcij', a[..., h:], v)) + x


class DoubleAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.convA = nn.Conv2d(channels, hidden, 1)
        self.convB = nn.Conv2d(channels, hidden, 1)
        self.convV = nn.Conv2d(channels, hidden, 1)
        self.conv_reconstruct = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.convA(x)
        gather = self.convB(x).flatten(2).softmax(-1)
        distribute = self.convV(x).flatten(2).softmax(1)
        descriptors = feature.flatten(2) @ gather.transpose(1, 2)
        return x + self.conv_reconstruct((descriptors @ distribute).view_as(feature))


class GlobalContext(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.conv_mask(x).flatten(2).softmax(-1)
        context = x.flatten(2) @ alpha.transpose(1, 2)
        return x + self.channel_add_conv(context[..., None])


# A learned memory.


def double_normalize(logits: Tensor) -> Tensor:
    """Softmax over positions, then a sum of one over the memory; logits `[..., n, k]`."""
    a = logits.softmax(-2)
    return a / (1e-9 + a.sum(-1, keepdim=True))


class ExternalAttention(nn.Module):
    def __init__(self, channels: int, memory_size: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.linear_0 = nn.Conv1d(channels, memory_size, 1, bias=False)
        self.linear_1 = nn.Conv1d(memory_size, channels, 1, bias=False)
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.linear_0(self.conv1(x).flatten(2)).softmax(-1)
        a = a / (1e-9 + a.sum(1, keepdim=True))
        return F.relu(self.conv2(self.linear_1(a).view_as(x)) + x)


class MultiHeadExternalAttention(nn.Module):
    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, width = 4 * heads, channels // heads
        self.trans_dims = nn.Linear(channels, 4 * channels)
        self.linear_0 = nn.Linear(width, 64)
        self.linear_1 = nn.Linear(64, width)
        self.proj = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.trans_dims(x.flatten(2).transpose(1, 2))
        y = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.linear_1(double_normalize(self.linear_0(y)))
        return self.proj(y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


PLAIN: dict[str, Callable[..., nn.Module]] = {
    'bam': BAM,
    'cam': ChannelAffinityAttention,
    'cbam': CBAM,
    'cbam_channel': CBAMChannel,
    'cbam_spatial': CBAMSpatial,
    'cgnl': CGNL,
    'coordinate': CoordinateAttention,
    'criss_cross': CrissCrossAttention,
    'cross_layer_non_local': CrossLayerNonLocal,
    'danet_head': DANetHead,
    'double_attention': DoubleAttention,
    'downsampled_self_attention': DownsampledSelfAttention,
    'eca': EfficientChannelAttention,
    'ese': EffectiveSqueezeExcite,
    'external_attention': ExternalAttention,
    'gc': GlobalContext,
    'gsop': GlobalSecondOrderPooling,
    'isqrt_cov': IterativeSqrtCovariancePooling,
    'multihead_external_attention': MultiHeadExternalAttention,
    'non_local': NonLocal,
    'pam': SelfAttention,
    'pyramid_self_attention': PyramidSelfAttention,
    'qkv': QKVAttention,
    'se': SqueezeExcite,
    'self_attention': SelfAttention,
    'sk': SelectiveKernel,
    'split_attention': SplitAttention,
    'triplet': TripletAttention,
}


# timm's.


def timm_layers() -> Any | None:
    """The module `timm.layers`; None where it is not installed or does not load."""
    if importlib.util.find_spec('timm') is None:
        return None
    if 'timm' not in sys.modules and not loads('timm'):
        # torchvision's wheel for CUDA beside a PyTorch for the CPU: its operators do not load, and
        # its own declarations of them then fail. Whoever uses no such operator needs only the name.
        for operator in ('nms', 'qnms'):
            signature = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
            torch.library.define(f'torchvision::{operator}', signature)
    try:
        import timm.layers
    except (ImportError, RuntimeError):
        return None
    return timm.layers


def loads(module: str) -> bool:
    """Whether a module can be imported; asked in a process of its own, as a failure leaves half."""
    command = [sys.executable, '-c', f'import {module}']
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# Name of a mechanism, or 'NAME/VARIANT', -> function of timm's layers and the channels.
TIMM: dict[str, Callable[[Any, int], nn.Module]] = {
    'cbam/timm': lambda t, c: t.cbam.CbamModule(c),
    'eca': lambda t, c: t.EcaModule(kernel_size=3),
    'ese': lambda t, c: t.EffectiveSEModule(c),
    'gc/timm': lambda t, c: t.GlobalContext(c),
    'non_local/timm': lambda t, c: t.NonLocalAttn(c),
    'se': lambda t, c: t.SEModule(c, rd_divisor=1),
    'sk': lambda t, c: t.SelectiveKernel(
        c, c, groups=32, rd_channels=max(c // 16, 32), split_input=False
    ),
    'split_attention': lambda t, c: t.SplitAttn(
        c, rd_channels=max(c // 2, 32) // 2, norm_layer=nn.BatchNorm2d
    ),
}


# What the benchmark takes.


@dataclasses.dataclass(frozen=True)
class Form:
    """A mechanism in PyTorch, ready to be timed.

    Attributes:
        source: 'timm', or 'plain' for a class of this file.
        forward: runs it in evaluation mode.
        forward_backward: runs it in training mode, and back.
        values: gives outputs in evaluation mode, outputs in training mode, and gradients by the
            inputs; maps as `[b, h, w, c]`, in float32.
    """

    source: str
    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    values: Callable[[], list[list[np.ndarray]]]


def names(mechanisms: Sequence[str]) -> list[str]:
    """What to compare when nothing is asked for: the mechanisms, and timm's variants of them."""
    variants = [name for name in TIMM if '/' in name and name.partition('/')[0] in mechanisms]
    return [*mechanisms, *(variants if timm_layers() else [])]


def create(
    name: str,
    variables: Mapping[str, Any],
    inputs: Sequence[np.ndarray],
    cotangents: Sequence[np.ndarray],
    arguments: Mapping[str, Any],
    *,
    dtype: str = 'float32',
    channels_last: bool = False,
    threads: int | None = None,
) -> Form | None:
    """Builds the PyTorch form of a mechanism with our weights; None where there is none.

    Args:
        name: registry name, or 'NAME/VARIANT'.
        variables: ours.
        inputs: maps `[b, h, w, c]`.
        cotangents: one for each output of ours.
        arguments: those of our mechanism that are not its defaults, without the variant's.
        dtype: 'float32' or 'bfloat16', of inputs and parameters.
        channels_last: lays maps out as `[b, h, w, c]` in memory; PyTorch's own layout otherwise.
        threads: number that PyTorch uses; None leaves it.
    """
    layers = timm_layers() if name in TIMM else None
    if not layers and name not in PLAIN:
        return None
    if threads:
        torch.set_num_threads(threads)
    channels = inputs[0].shape[-1]
    module = TIMM[name](layers, channels) if layers else PLAIN[name](channels, **arguments)
    mechanism, _, variant = name.partition('/')
    entry = attention_entry(mechanism)
    ours = {**(entry.variants[variant] if variant else {}), **arguments}
    state = to_state_dict(mechanism, variables, source='timm' if variant else None, **ours)
    own = module.state_dict()
    module.load_state_dict(
        {  # a norm's [r] and [r, 1, 1] are the same
            key: torch.from_numpy(np.array(value, np.float32)).reshape(
                own[key].shape if key in own and own[key].numel() == value.size else value.shape
            )
            for key, value in state.items()
        }
    )

    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch_dtype = getattr(torch, dtype)
    module = module.to(torch_dtype).to(memory_format=layout).train()
    frozen = copy.deepcopy(module).eval()

    def tensor(value: np.ndarray) -> Tensor:
        result = torch.from_numpy(np.array(value, np.float32)).to(torch_dtype)
        if result.ndim < 4:
            return result
        return result.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    xs = [tensor(x).requires_grad_() for x in inputs]
    gs = [tensor(g) for g in cotangents]

    def outputs(model: nn.Module) -> list[Tensor]:
        out = model(*xs)
        return list(out) if isinstance(out, tuple) else [out]

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return outputs(frozen)

    def forward_backward() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        for x in xs:
            x.grad = None
        out = outputs(module)
        torch.autograd.backward(out, gs)
        return out

    def values() -> list[list[np.ndarray]]:
        results = [forward(), forward_backward(), [x.grad for x in xs]]
        return [[array(t) for t in group] for group in results]

    return Form('timm' if layers else 'plain', forward, forward_backward, values)


def array(value: Tensor) -> np.ndarray:
    """A tensor as our arrays are laid out, in float32."""
    value = value.detach().float()
    return (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy()


def versions() -> dict[str, str]:
    """Versions of PyTorch and, where it loads, timm."""
    found = {'torch': torch.__version__}
    if timm_layers():
        found['timm'] = sys.modules['timm'].__version__
    return found
