"""The named ResNets: each a line with its depth and what it has beside the fields of `ResNet`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax import checks
from attention_jax.models.registry import create_described, register_described, register_model
from attention_jax.models.resnet import ResNet
from attention_jax.models.resnet_torch_names import Naming, torch_names
from attention_jax.modules.registry import attention_entry

_Fields = Mapping[str, Any]

_DEPTHS = {
    10: ('basic', (1, 1, 1, 1)),
    14: ('bottleneck', (1, 1, 1, 1)),
    18: ('basic', (2, 2, 2, 2)),
    26: ('bottleneck', (2, 2, 2, 2)),
    33: ('bottleneck', (2, 3, 3, 2)),
    34: ('basic', (3, 4, 6, 3)),
    50: ('bottleneck', (3, 4, 6, 3)),
    101: ('bottleneck', (3, 4, 23, 3)),
    152: ('bottleneck', (3, 8, 36, 3)),
    200: ('bottleneck', (3, 24, 36, 3)),
    269: ('bottleneck', (3, 30, 48, 8)),
    # of three stages, for CIFAR
    8: ('basic', (1, 1, 1)),
    20: ('basic', (3, 3, 3)),
    32: ('basic', (5, 5, 5)),
    44: ('basic', (7, 7, 7)),
    56: ('basic', (9, 9, 9)),
    110: ('basic', (18, 18, 18)),
}


def _described(depth: int, *parts: _Fields) -> dict[str, Any]:
    """The fields of a ResNet of `depth` layers with those of all parts, of which the last wins."""
    block, depths = _DEPTHS[depth]
    fields = {'block': block, 'depths': depths}
    for part in parts:
        fields |= part
    return fields


def _network(
    name: str,
    depth: int,
    *parts: _Fields,
    size: int = 224,
    naming: Naming | None = None,
    **facts: Any,
) -> None:
    fields = _described(depth, *parts)
    names = functools.partial(torch_names, naming=naming or Naming())
    facts |= {'input_size': (size, size), 'rank': fields.get('spatial_dims', 2)}
    register_described(ResNet, name, fields, family='resnet', torch_names=names, **facts)


def _groups(cardinality: int, base_width: int) -> _Fields:
    """The 3x3 of a ResNeXt."""
    return {'cardinality': cardinality, 'base_width': base_width}


def _with(attention: str, **arguments: Any) -> _Fields:
    """A mechanism with its arguments."""
    given = {'attention_args': arguments} if arguments else {}
    return {'attention': attention, **given}


# Who says what accuracy; 'authors' is their repository or their paper.
_TV1, _TV2, _AUTHORS, _PAPER = 'torchvision V1', 'torchvision V2', 'authors', 'paper'
_QUOTED, _ON_CIFAR = 'paper, as ECA-Net quotes it', 'paper, CIFAR-10'

_V1 = {'stride_in': 'conv1'}
_32X4D = _groups(32, 4)
# Stems and shortcuts of ResNet-C, -D, -S and -T.
_C = {'stem': 'deep', 'stem_widths': (32, 32, 64)}
_D = {**_C, 'shortcut': 'avg'}
_S = {'stem': 'deep', 'stem_widths': (64, 64, 128)}
_T = {'stem': 'deep', 'stem_widths': (24, 32, 64), 'shortcut': 'avg'}
# What timm's ResNets have beyond torchvision's: the last norm of each branch starts at 0.
_TIMM = {'zero_init_last': True}

# Plain networks.
_resnet = functools.partial(_network, paper='arXiv 1512.03385')
_resnet('resnet18', 18, published=[(69.76, _TV1)])
_resnet('resnet26', 26)
_resnet('resnet34', 34, published=[(73.31, _TV1)])
_resnet('resnet50', 50, published=[(76.13, _TV1), (80.86, _TV2)])
_resnet('resnet101', 101, published=[(77.37, _TV1), (81.89, _TV2)])
_resnet('resnet152', 152, published=[(78.31, _TV1), (82.28, _TV2)])
_resnet('resnet50_v1', 50, _V1)
_resnet('resnet101_v1', 101, _V1)
_resnet('resnet152_v1', 152, _V1)
_resnext = functools.partial(_network, paper='arXiv 1611.05431')
_resnext('resnext50_32x4d', 50, _32X4D, published=[(77.62, _TV1), (81.20, _TV2)])
_resnext('resnext50_32x4d_v1', 50, _32X4D, _V1)
_resnext('resnext101_32x4d', 101, _32X4D)
_resnext('resnext101_32x8d', 101, _groups(32, 8), published=[(79.31, _TV1), (82.83, _TV2)])
_resnext('resnext101_64x4d', 101, _groups(64, 4))
_wide = functools.partial(_network, paper='arXiv 1605.07146')
_wide('wide_resnet50_2', 50, {'base_width': 128}, published=[(78.47, _TV1), (81.60, _TV2)])

# Plain networks with other stems and shortcuts, as timm has them.
_timm = functools.partial(_network, preprocessing='timm')
_tricks = functools.partial(_timm, paper='arXiv 1812.01187, as timm has it')
_tricks('resnet18d', 18, _D, _TIMM)
_tricks('resnet26d', 26, _D, _TIMM)
_tricks('resnet34d', 34, _D, _TIMM)
_tricks('resnet50d', 50, _D, _TIMM)
_tricks('resnet101d', 101, _D, _TIMM, size=256)
_tricks('resnet152d', 152, _D, _TIMM, size=256)
_tricks('resnet200d', 200, _D, _TIMM, size=256)
_tricks('resnet50c', 50, _C, _TIMM)
_tricks('resnet50s', 50, _S, _TIMM)
_tricks('resnet10t', 10, _T, _TIMM, size=176)
_tricks('resnet14t', 14, _T, _TIMM, size=176)
_tricks('resnet26t', 26, _T, _TIMM, size=256)
_tricks('resnet50t', 50, _T, _TIMM)
_timm('resnext50d_32x4d', 50, _32X4D, _D, _TIMM, paper='arXiv 1611.05431, as timm has it')

# ECA: timm's.
_ADAPTIVE_ECA = _with('eca', kernel_size=None)  # the paper's formula
_eca = functools.partial(
    _timm, paper='arXiv 1910.03151, as timm has it', naming=Naming(prefix='se')
)
_ECA = {**_ADAPTIVE_ECA, **_TIMM}
_eca('ecaresnet50d', 50, _D, _ECA)
_eca('ecaresnet101d', 101, _D, _ECA)
_eca('ecaresnet200d', 200, _D, _ECA, size=256)
_eca('ecaresnet269d', 269, _D, _ECA, size=320)
_eca('ecaresnet26t', 26, _T, _ECA, size=256)
_eca('ecaresnet50t', 50, _T, _ECA, size=256)
_eca('ecaresnext26t_32x4d', 26, _32X4D, _T, _ECA)
_eca('ecaresnext50t_32x4d', 50, _32X4D, _T, _ECA)
_eca('ecaresnetlight', 50, {'depths': (1, 1, 11, 3), 'shortcut': 'avg'}, _ECA)

# ECA: the authors' (BangguWu/ECANet), with their released kernel sizes, one a stage.


def _create_eca(depth: int, *, kernel_size: int | Sequence[int] | str, **arguments: Any) -> ResNet:
    """ECA-Net: `kernel_size` is an odd number, one a stage, or 'adaptive' (the paper's formula)."""
    if isinstance(kernel_size, str):
        checks.choice('kernel_size', kernel_size, ('adaptive',))
        sizes: Sequence[int | None] = (None,) * 4
    else:
        sizes = (kernel_size,) * 4 if isinstance(kernel_size, int) else kernel_size
    if len(sizes) != 4:
        raise ValueError(f'kernel_size must have one entry a stage, 4, got {len(sizes)}')
    fields = {'attention': 'eca', 'attention_args': tuple({'kernel_size': k} for k in sizes)}
    return create_described(ResNet, _described(depth, fields), **arguments)


def _eca_net(name: str, depth: int, *kernel_size: int, **facts: Any) -> None:
    create = functools.partial(_create_eca, depth, kernel_size=kernel_size)
    facts |= {'family': 'resnet', 'paper': 'arXiv 1910.03151', 'torch_names': torch_names}
    register_model(name, create, **facts)


_eca_net('eca_resnet18', 18, 3, 5, 7, 7, published=[(70.92, _AUTHORS)])
_eca_net('eca_resnet34', 34, 3, 3, 5, 7)
_eca_net('eca_resnet50', 50, 3, 5, 5, 7, published=[(77.48, _PAPER), (77.42, _AUTHORS)])
_eca_net('eca_resnet101', 101, 3, 3, 5, 7, published=[(78.65, _AUTHORS)])
_eca_net('eca_resnet152', 152, 3, 3, 5, 7, published=[(78.92, _AUTHORS)])

# SE.
_SE = _with('se', use_bias=False)
_se = functools.partial(
    _network,
    paper='arXiv 1709.01507, as moskomule/senet.pytorch has it',
    naming=Naming(prefix='se', scheme='article'),
)
_se('se_resnet18', 18, _SE)
_se('se_resnet34', 34, _SE)
_se('se_resnet50', 50, _SE, published=[(77.06, 'moskomule/senet.pytorch')])
_se('se_resnet101', 101, _SE)
_se('se_resnet152', 152, _SE)
_network(
    'se_resnet50_srm',
    50,
    _with('se'),
    paper='arXiv 1709.01507, as hyunjaelee410/style-based-recalibration-module has it',
)

_SE_BY_8 = _with('se', hidden_divisor=8)
_TIMM_SE = {**_SE_BY_8, **_TIMM}
_SENET154 = {**_groups(64, 4), 'first_divisor': 2, 'shortcut': 'conv3', **_S}
_timm_se = functools.partial(_timm, paper='arXiv 1709.01507, as timm has it')
_seresnet = functools.partial(_timm_se, naming=Naming(prefix='se'))
_seresnet('seresnet18', 18, _TIMM_SE)
_seresnet('seresnet34', 34, _TIMM_SE)
_seresnet('seresnet50', 50, _TIMM_SE)
_seresnet('seresnet101', 101, _TIMM_SE)
_seresnet('seresnet152', 152, _TIMM_SE)
_seresnet('seresnet50t', 50, _T, _TIMM_SE)
_seresnet('seresnet152d', 152, _D, _TIMM_SE, size=256)
_seresnet('seresnext26d_32x4d', 26, _32X4D, _D, _TIMM_SE)
_seresnet('seresnext26t_32x4d', 26, _32X4D, _T, _TIMM_SE)
_seresnet('seresnext50_32x4d', 50, _32X4D, _TIMM_SE)
_seresnet('seresnext101_32x4d', 101, _32X4D, _TIMM_SE)
_seresnet('seresnext101_32x8d', 101, _groups(32, 8), _TIMM_SE)
_seresnet('senet154', 152, _SENET154, _TIMM_SE)

# The SE authors' Caffe networks, under their own names and under timm's, which all have dropout.
_LEGACY = Naming(backbone='legacy', prefix='se_module')
_CAFFE = {'stem_pool': 'max_ceil', **_with('se')}
_DROP = {'dropout_rate': 0.2}
_AFTER_RELU = {'placement': 'branch_after_relu', **_CAFFE, **_DROP}
_caffe = functools.partial(_network, paper='arXiv 1709.01507', naming=_LEGACY)
_caffe('se_resnet50_caffe', 50, _V1, _CAFFE, published=[(77.63, _AUTHORS), (76.71, _QUOTED)])
_caffe('se_resnet101_caffe', 101, _V1, _CAFFE, published=[(78.25, _AUTHORS), (77.62, _PAPER)])
_caffe('se_resnet152_caffe', 152, _V1, _CAFFE, published=[(78.66, _AUTHORS), (78.43, _PAPER)])
_caffe('se_resnext50_caffe', 50, _32X4D, _CAFFE, published=[(79.03, _AUTHORS)])
_caffe('se_resnext101_caffe', 101, _32X4D, _CAFFE, published=[(80.19, _AUTHORS)])
_caffe('senet154_caffe', 152, _SENET154, _CAFFE, _DROP, published=[(81.32, _AUTHORS)])
_legacy = functools.partial(_timm_se, naming=_LEGACY)
_legacy('legacy_seresnet18', 18, _AFTER_RELU)
_legacy('legacy_seresnet34', 34, _AFTER_RELU)
_legacy('legacy_seresnet50', 50, _V1, _CAFFE, _DROP)
_legacy('legacy_seresnet101', 101, _V1, _CAFFE, _DROP)
_legacy('legacy_seresnet152', 152, _V1, _CAFFE, _DROP)
_legacy('legacy_seresnext26_32x4d', 26, _32X4D, _CAFFE, _DROP)
_legacy('legacy_seresnext50_32x4d', 50, _32X4D, _CAFFE, _DROP)
_legacy('legacy_seresnext101_32x4d', 101, _32X4D, _CAFFE, _DROP)
_legacy('legacy_senet154', 152, _SENET154, _CAFFE, _DROP)

# timm's byobnet.py: tiered stems, mechanisms in the middle of the bottleneck.
_BYOB = {**_T, 'shortcut': 'conv', 'initialization': 'byob', **_TIMM}
_NEXT_TS = {'group_width': 32, 'activation': 'silu', **_BYOB}
_50T = {'stem_pool': 'none', **_BYOB}
_33TS = {'activation': 'silu', 'widths': (64, 128, 384, 384), 'features': 1280, **_50T}
_MID = {'placement': 'mid'}
_MID_GC = {**_MID, **_with('gc', reduction=8, norm_eps=1e-6)}
_MID_SE = {**_MID, **_SE_BY_8}
_MID_ECA = {**_MID, **_ADAPTIVE_ECA}
_byob = functools.partial(
    _timm,
    paper='as timm has it',
    size=256,
    naming=Naming(backbone='byob', prefix='attn', scheme='timm'),
)
_byob('resnet33ts', 33, _33TS)
_byob('resnext26ts', 26, _NEXT_TS)
_byob('gcresnet33ts', 33, _33TS, _MID_GC)
_byob('gcresnet50t', 50, _50T, _MID_GC)
_byob('gcresnext26ts', 26, _NEXT_TS, _MID_GC)
_byob('gcresnext50ts', 50, _NEXT_TS, _MID_GC)
_byob('seresnet33ts', 33, _33TS, _MID_SE)
_byob('seresnext26ts', 26, _NEXT_TS, _MID_SE)
_byob('eca_resnet33ts', 33, _33TS, _MID_ECA)
_byob('eca_resnext26ts', 26, _NEXT_TS, _MID_ECA)

# Other authors' networks with a mechanism after each block's last norm, or after each stage.
_CBAM_INIT = {'initialization': 'cbam'}
_CBAM, _BAM, _TRIPLET = ({**_with(name), **_CBAM_INIT} for name in ('cbam', 'bam', 'triplet'))
_cbam = functools.partial(_network, paper='arXiv 1807.06521')
_cbam('cbam_resnet18', 18, _CBAM)
_cbam('cbam_resnet34', 34, _CBAM)
_cbam('cbam_resnet50', 50, _CBAM, published=[(77.62, _AUTHORS)])
_cbam('cbam_resnet101', 101, _CBAM)
_bam = functools.partial(_network, paper='arXiv 1807.06514')
_bam('bam_resnet18', 18, _BAM)
_bam('bam_resnet34', 34, _BAM)
_bam('bam_resnet50', 50, _BAM, published=[(76.86, _AUTHORS)])
_bam('bam_resnet101', 101, _BAM)
_triplet = functools.partial(_network, paper='arXiv 2010.03045', naming=Naming(scheme='models'))
_triplet('triplet_resnet18', 18, _TRIPLET, published=[(71.09, _AUTHORS)])
_triplet('triplet_resnet34', 34, _TRIPLET)
_triplet('triplet_resnet50', 50, _TRIPLET, published=[(77.48, _AUTHORS)])
_triplet('triplet_resnet101', 101, _TRIPLET)
_gc = functools.partial(_network, paper='arXiv 1904.11492')
_gc('gc_resnet50', 50, _with('gc'))
_gc('gc_resnet50_r4', 50, _with('gc', reduction=4))
_gc('gc_resnet50_r16', 50, _with('gc', reduction=16), published=[(77.7, _QUOTED)])
_gc('gc_resnet50_r16_all', 50, _with('gc'), {'placement': 'branch'})
_gc('gc_resnet101', 101, _with('gc'))
_gc('gc_resnet101_r4', 101, _with('gc', reduction=4))
_gc('gc_resnet101_r16', 101, _with('gc', reduction=16))

# Modules of their own between the blocks: Non-local, A2, CGNL; two of them for videos.
_VIDEO = {'spatial_dims': 3, 'dropout_rate': 0.5}
_NON_LOCAL = {**_with('non_local'), 'initialization': 'non_local'}
_ONE = {'placement': 'before_block@3:5'}
_FIVE = {'placement': 'after_block@2:1,3+3:1,3,5'}
_TEN = {'placement': 'after_block@2:0,1,2,3+3:0,1,2,3,4,5'}
_non_local = functools.partial(_network, paper='arXiv 1711.07971')
_non_local('nl_resnet50_1', 50, _NON_LOCAL, _ONE)
_non_local('nl_resnet50_5', 50, _NON_LOCAL)
_non_local('nl_resnet50_10', 50, _NON_LOCAL, _TEN)
_non_local('nl_resnet101_5', 101, _NON_LOCAL)
_non_local('nl_resnet50_5_video', 50, _NON_LOCAL, _VIDEO)
_network(
    'nl_resnet50_1_cgnl',
    50,
    _with('non_local', use_bias=False, pool_size=1, scale=None),
    _ONE,
    paper='arXiv 1711.07971, as KaiyuYue/cgnl-network.pytorch has it',
)
_a2 = functools.partial(_network, paper='arXiv 1810.11579')
_a2('a2_resnet50_5_d2', 50, _with('double_attention', reduction=2), published=[(77.0, _QUOTED)])
_a2('a2_resnet50_5_d4', 50, _with('double_attention', reduction=4))
_a2('a2_resnet50_5_video', 50, _with('double_attention', reduction=2), _VIDEO)
_CGNL = {**_with('cgnl'), 'initialization': 'cgnl', 'dropout_rate': 0.5}
_cgnl = functools.partial(_network, paper='arXiv 1810.13125')
_cgnl('cgnl_resnet50_1', 50, _CGNL, published=[(77.69, _AUTHORS)])
_cgnl('cgnl_resnet101_1', 101, _CGNL)
_cgnl('cgnl_resnet152_1', 152, _CGNL, published=[(79.53, _AUTHORS)])
_cgnl('cgnl_resnet50_5', 50, _CGNL, _FIVE)


# GSoP: one module in the last block of each stage; the last stage keeps its resolution.
def _gsop(**arguments: Any) -> _Fields:
    by_stage = tuple({'strides': strides, **arguments} for strides in (2, 1, 1, 1))
    return {'attention': 'gsop', 'attention_args': by_stage, 'strides': (1, 2, 2, 1)}


_NET2 = {
    **_gsop(),
    'placement': 'last_block@1+2+3',
    'pool': 'isqrt_cov',
    'pool_args': {'iterations': 3, 'triangle': 'lower'},
}
_CHANNEL = _gsop(mode='channel')
_gsop_net = functools.partial(_network, paper='arXiv 1811.12006')
_gsop_net('gsop_net1_resnet50', 50, _CHANNEL, published=[(77.98, _AUTHORS), (77.68, _QUOTED)])
_gsop_net('gsop_net1_resnet50_average', 50, _gsop(mode='fusion_avg'))
_gsop_net('gsop_net1_resnet50_concat', 50, _gsop(mode='fusion_concat'))
_gsop_net('gsop_net1_resnet50_max', 50, _gsop(mode='fusion_max'))
_gsop_net('gsop_net1_resnet50_position', 50, _gsop(mode='position'))
_gsop_net('gsop_net1_resnet101', 101, _CHANNEL)
_gsop_net('gsop_net2_resnet50', 50, _NET2, published=[(78.81, _AUTHORS)])
_gsop_net('gsop_net2_resnet101', 101, _NET2)

# SK.
_TIMM_SK, _TIMM_SKNEXT, _TIMM_SKRESNET = (
    _with('sk', **attention_entry('sk').variants[variant])
    for variant in ('timm', 'timm_skresnext', 'timm_skresnet')
)
_CONV1_SK = {**_TIMM_SKRESNET, 'placement': 'conv1'}
_SK101 = {'attention_args': ({}, {'hidden': 16}, {}, {})}  # as released
_sk = functools.partial(_network, paper='arXiv 1903.06586', naming=Naming(backbone='timm_sk'))
_sk('sknet50', 50, _32X4D, _with('sk'), published=[(79.21, _AUTHORS)])
_sk('sknet101', 101, _32X4D, _with('sk'), _SK101, published=[(79.81, _AUTHORS)])
_timm_sk = functools.partial(_sk, paper='arXiv 1903.06586, as timm has it', preprocessing='timm')
_timm_sk('skresnet18', 18, _CONV1_SK)
_timm_sk('skresnet34', 34, _CONV1_SK)
_timm_sk('skresnet50', 50, _TIMM_SK)
_timm_sk('skresnet50d', 50, _D, _TIMM_SK)
_timm_sk('skresnext50_32x4d', 50, _32X4D, _TIMM_SKNEXT)


# ResNeSt; the fast ones pool before the strided split attention and not after it.
def _split(radix: int, groups: int = 1, width: int = 64, conv2_pool: str = 'after') -> _Fields:
    attention = _with('split_attention', radix=radix, groups=groups)
    return {**attention, **_groups(groups, width), 'conv2_pool': conv2_pool}


_split_fast = functools.partial(_split, conv2_pool='before')
_E = {**_D, **_S}
_resnest = functools.partial(_network, paper='arXiv 2004.08955')
_resnest('resnest14', 14, _D, _split(2))
_resnest('resnest26', 26, _D, _split(2))
_resnest('resnest50', 50, _D, _split(2), published=[(81.03, _AUTHORS)])
_resnest('resnest101', 101, _E, _split(2), size=256, published=[(82.83, _AUTHORS)])
_resnest('resnest200', 200, _E, _split(2), size=320, published=[(83.84, _AUTHORS)])
_resnest('resnest269', 269, _E, _split(2), size=416, published=[(84.54, _AUTHORS)])
_resnest('resnest50_fast_1s1x64d', 50, _D, _split_fast(1), published=[(80.33, _AUTHORS)])
_resnest('resnest50_fast_2s1x64d', 50, _D, _split_fast(2), published=[(80.53, _AUTHORS)])
_resnest('resnest50_fast_4s1x64d', 50, _D, _split_fast(4))
_resnest('resnest50_fast_1s2x40d', 50, _D, _split_fast(1, 2, 40), published=[(80.59, _AUTHORS)])
_resnest('resnest50_fast_2s2x40d', 50, _D, _split_fast(2, 2, 40), published=[(80.61, _AUTHORS)])
_resnest('resnest50_fast_4s2x40d', 50, _D, _split_fast(4, 2, 40), published=[(81.14, _AUTHORS)])
_resnest('resnest50_fast_1s4x24d', 50, _D, _split_fast(1, 4, 24), published=[(80.99, _AUTHORS)])
_timm_resnest = functools.partial(_timm, paper='arXiv 2004.08955, as timm has it')
_timm_resnest('resnest14d', 14, _D, _split(2), _TIMM)
_timm_resnest('resnest26d', 26, _D, _split(2), _TIMM)
_timm_resnest('resnest50d', 50, _D, _split(2), _TIMM)
_timm_resnest('resnest101e', 101, _E, _split(2), _TIMM, size=256)
_timm_resnest('resnest200e', 200, _E, _split(2), _TIMM, size=320)
_timm_resnest('resnest269e', 269, _E, _split(2), _TIMM, size=416)
_timm_resnest('resnest50d_4s2x40d', 50, _D, _split_fast(4, 2, 40), _TIMM)
_timm_resnest('resnest50d_1s4x24d', 50, _D, _split_fast(1, 4, 24), _TIMM)

# For CIFAR: three stages, and the wide ones of CBAM's authors.
_SMALL = {
    'widths': (16, 32, 64),
    'stem': 'cifar',
    'stem_widths': (16,),
    'shortcut': 'pad',
    'initialization': 'cifar',
    'num_classes': 10,
}
_SMALL_B = {**_SMALL, 'shortcut': 'conv'}
_cifar = functools.partial(_network, paper='arXiv 1512.03385, section 4.2', size=32)
_cifar('cifar_resnet20', 20, _SMALL, published=[(91.25, _ON_CIFAR)])
_cifar('cifar_resnet32', 32, _SMALL, published=[(92.49, _ON_CIFAR)])
_cifar('cifar_resnet44', 44, _SMALL, published=[(92.83, _ON_CIFAR)])
_cifar('cifar_resnet56', 56, _SMALL, published=[(93.03, _ON_CIFAR)])
_cifar('cifar_resnet110', 110, _SMALL, published=[(93.57, f'{_ON_CIFAR}, best of 5')])
_cifar('cifar_resnet20_b', 20, _SMALL_B)
_cifar('cifar_resnet32_b', 32, _SMALL_B)
_cifar('cifar_resnet44_b', 44, _SMALL_B)
_cifar('cifar_resnet56_b', 56, _SMALL_B)
_cifar('cifar_resnet110_b', 110, _SMALL_B)
_cifar_se = functools.partial(
    _network, paper='arXiv 1709.01507, as moskomule/senet.pytorch has it', size=32
)
_cifar_se('cifar_se_resnet20', 20, _SMALL_B, _SE)
_cifar_se('cifar_se_resnet32', 32, _SMALL_B, _SE)
_cifar_se('cifar_se_resnet44', 44, _SMALL_B, _SE)
_cifar_se('cifar_se_resnet56', 56, _SMALL_B, _SE)
_WIDE = {'stem': 'cifar', 'num_classes': 100, **_CBAM_INIT}
_cifar_wide = functools.partial(_network, paper='arXiv 1807.06521, CIFAR-100', size=32)
_cifar_wide('cifar_wide_resnet18', 18, _WIDE)
_cifar_wide('cifar_wide_resnet50', 50, _WIDE)
_cifar_wide('cifar_cbam_resnet18', 18, _WIDE, _CBAM)
_cifar_wide('cifar_cbam_resnet50', 50, _WIDE, _CBAM)
_cifar_wide('cifar_bam_resnet18', 18, _WIDE, _BAM)
_cifar_wide('cifar_bam_resnet50', 50, _WIDE, _BAM)
_TINY = 'one block a stage, for tests and quick runs'
_network('tiny_resnet', 8, _SMALL, paper=_TINY, size=32)
