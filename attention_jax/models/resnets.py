"""The named ResNets: each a description of `ResNet`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax import checks
from attention_jax.models.registry import create_described, register_model
from attention_jax.models.resnet import ResNet
from attention_jax.models.resnet_names import Naming, torch_names
from attention_jax.modules.registry import attention_entry

_DEPTHS = {
    10: ('basic', (1, 1, 1, 1)),
    14: ('bottleneck', (1, 1, 1, 1)),
    18: ('basic', (2, 2, 2, 2)),
    26: ('bottleneck', (2, 2, 2, 2)),
    34: ('basic', (3, 4, 6, 3)),
    50: ('bottleneck', (3, 4, 6, 3)),
    101: ('bottleneck', (3, 4, 23, 3)),
    152: ('bottleneck', (3, 8, 36, 3)),
    200: ('bottleneck', (3, 24, 36, 3)),
    269: ('bottleneck', (3, 30, 48, 8)),
}
_DEEP = {'stem': 'deep', 'stem_widths': (32, 32, 64)}
_D = {**_DEEP, 'shortcut': 'avg'}
_S = {'stem': 'deep', 'stem_widths': (64, 64, 128)}
_T = {'stem': 'deep', 'stem_widths': (24, 32, 64), 'shortcut': 'avg'}
_V1 = {'stride_in': 'conv1'}
_CAFFE = {'stem_pool': 'max_ceil'}

# What timm's ResNets have beyond torchvision's: the last norm of each branch starts at 0.
_TIMM = {'zero_init_last': True}
_TIMM_SE = {'attention': 'se', 'attention_args': {'hidden_divisor': 8}, **_TIMM}
_ADAPTIVE = {'kernel_size': None}  # the paper's formula
_TIMM_ECA = {'attention': 'eca', 'attention_args': _ADAPTIVE, **_TIMM}
_TIMM_NAMES = Naming(prefix='se')
_LEGACY_NAMES = Naming(backbone='legacy', prefix='se_module')
_BYOB_NAMES = Naming(backbone='byob', prefix='attn', scheme='timm')
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)

# Released kernel sizes of ECA-Net, one a stage (BangguWu/ECANet, README and eca_resnet.py).
_ECA_KERNELS = {
    18: (3, 5, 7, 7),
    34: (3, 3, 5, 7),
    50: (3, 5, 5, 7),
    101: (3, 3, 5, 7),
    152: (3, 3, 5, 7),
}
_NON_LOCAL_TEN = 'after_block@2:0,1,2,3+3:0,1,2,3,4,5'


def _register(
    name: str, description: Mapping[str, Any], *, names: Naming | None = None, **facts: Any
) -> None:
    def build(**arguments: Any) -> ResNet:
        return create_described(ResNet, description, arguments)

    facts = {'family': 'resnet', 'rank': description.get('spatial_dims', 2), **facts}
    if 'timm' in facts['paper']:
        facts['preprocessing'] = 'timm'
    foreign = functools.partial(torch_names, naming=names or Naming())
    register_model(name, build, torch_names=foreign, **facts)


def _described(depth: int, **more: Any) -> dict[str, Any]:
    block, depths = _DEPTHS[depth]
    return {'block': block, 'depths': depths, **more}


def _variant(attention: str, name: str) -> Mapping[str, Any]:
    """The arguments of a mechanism's published form."""
    return attention_entry(attention).variants[name]


def _eca(depth: int) -> Any:
    """ECA-Net: `kernel_size` is an odd number, one a stage, or 'adaptive' (the paper's formula)."""

    def build(
        *, kernel_size: int | Sequence[int] | str = _ECA_KERNELS[depth], **arguments: Any
    ) -> ResNet:
        description = _described(depth, attention='eca')
        if isinstance(kernel_size, str):
            checks.choice('kernel_size', kernel_size, ('adaptive',))
            sizes: Sequence[int | None] = (None,) * 4
        elif isinstance(kernel_size, int):
            sizes = (kernel_size,) * 4
        else:
            sizes = kernel_size
        if len(sizes) != 4:
            raise ValueError(f'kernel_size must have one entry a stage, 4, got {len(sizes)}')
        description['attention_args'] = tuple({'kernel_size': k} for k in sizes)
        return create_described(ResNet, description, arguments)

    return build


def _register_all() -> None:
    _register_plain()
    _register_timm()
    _register_se()
    _register_byob()
    _register_authors()
    _register_inserted()
    _register_gsop()
    _register_sk()
    _register_resnest()
    _register_cifar()


def _register_plain() -> None:
    paper = 'arXiv 1512.03385'
    for depth in (18, 26, 34, 50, 101, 152):
        _register(f'resnet{depth}', _described(depth), paper=paper)
    for depth in (50, 101, 152):
        _register(f'resnet{depth}_v1', _described(depth, **_V1), paper=paper)
    paper = 'arXiv 1611.05431'
    for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 32, 8), (101, 64, 4)):
        next_ = _described(depth, cardinality=groups, base_width=width)
        _register(f'resnext{depth}_{groups}x{width}d', next_, paper=paper)
    _register(
        'resnext50_32x4d_v1', _described(50, cardinality=32, base_width=4, **_V1), paper=paper
    )
    _register('wide_resnet50_2', _described(50, base_width=128), paper='arXiv 1605.07146')


def _register_timm() -> None:
    """Deep and tiered stems, average-pool shortcuts; with ECA."""
    paper = 'arXiv 1812.01187, as timm has it'
    for depth in (18, 26, 34, 50, 101, 152, 200):
        size = 256 if depth >= 101 else 224
        description = _described(depth, **_D, **_TIMM)
        _register(f'resnet{depth}d', description, paper=paper, input_size=(size, size))
    _register('resnet50c', _described(50, **_DEEP, **_TIMM), paper=paper)
    _register('resnet50s', _described(50, **_S, **_TIMM), paper=paper)
    for depth in (10, 14, 26, 50):
        size = {10: 176, 14: 176, 26: 256}.get(depth, 224)
        description = _described(depth, **_T, **_TIMM)
        _register(f'resnet{depth}t', description, paper=paper, input_size=(size, size))
    _register(
        'resnext50d_32x4d',
        _described(50, cardinality=32, base_width=4, **_D, **_TIMM),
        paper='arXiv 1611.05431, as timm has it',
    )
    eca: dict[str, tuple[dict[str, Any], int]] = {
        f'ecaresnet{depth}d': (_described(depth, **_D, **_TIMM_ECA), size)
        for depth, size in ((50, 224), (101, 224), (200, 256), (269, 320))
    }
    eca |= {f'ecaresnet{depth}t': (_described(depth, **_T, **_TIMM_ECA), 256) for depth in (26, 50)}
    eca |= {
        f'ecaresnext{depth}t_32x4d': (
            _described(depth, cardinality=32, base_width=4, **_T, **_TIMM_ECA),
            224,
        )
        for depth in (26, 50)
    }
    light = {**_described(50, shortcut='avg', **_TIMM_ECA), 'depths': (1, 1, 11, 3)}
    eca['ecaresnetlight'] = light, 224
    for name, (description, size) in eca.items():
        _register(
            name,
            description,
            paper='arXiv 1910.03151, as timm has it',
            input_size=(size, size),
            names=_TIMM_NAMES,
        )


def _register_se() -> None:
    for depth in (18, 34, 50, 101, 152):
        _register(
            f'se_resnet{depth}',
            _described(depth, attention='se', attention_args={'use_bias': False}),
            paper='arXiv 1709.01507, as moskomule/senet.pytorch has it',
            names=Naming(prefix='se', scheme='article'),
        )
    _register(
        'se_resnet50_srm',
        _described(50, attention='se'),
        paper='arXiv 1709.01507, as hyunjaelee410/style-based-recalibration-module has it',
    )
    timm: dict[str, dict[str, Any]] = {
        f'seresnet{depth}': _described(depth, **_TIMM_SE) for depth in (18, 34, 50, 101, 152)
    }
    timm['seresnet50t'] = _described(50, **_T, **_TIMM_SE)
    timm['seresnet152d'] = _described(152, **_D, **_TIMM_SE)
    for depth, width, suffix in (
        (26, 4, 'd'),
        (26, 4, 't'),
        (50, 4, ''),
        (101, 4, ''),
        (101, 8, ''),
    ):
        stem = {'d': _D, 't': _T, '': {}}[suffix]
        timm[f'seresnext{depth}{suffix}_32x{width}d'] = _described(
            depth, cardinality=32, base_width=width, **stem, **_TIMM_SE
        )
    senet154 = {
        'cardinality': 64,
        'base_width': 4,
        'first_divisor': 2,
        'shortcut': 'conv3',
        **_S,
    }
    timm['senet154'] = _described(152, **senet154, **_TIMM_SE)
    for name, description in timm.items():
        size = 256 if name == 'seresnet152d' else 224
        _register(
            name,
            description,
            paper='arXiv 1709.01507, as timm has it',
            input_size=(size, size),
            names=_TIMM_NAMES,
        )
    # The authors' Caffe networks, under their own names and under timm's.
    caffe: dict[tuple[str, str], dict[str, Any]] = {
        (f'se_resnet{depth}_caffe', f'legacy_seresnet{depth}'): _described(depth, **_V1)
        for depth in (50, 101, 152)
    }
    caffe |= {
        (f'se_resnext{depth}_caffe', f'legacy_seresnext{depth}_32x4d'): _described(
            depth, cardinality=32, base_width=4
        )
        for depth in (50, 101)
    }
    caffe['senet154_caffe', 'legacy_senet154'] = _described(152, dropout_rate=0.2, **senet154)
    caffe['', 'legacy_seresnext26_32x4d'] = _described(26, cardinality=32, base_width=4)
    for depth in (18, 34):
        caffe['', f'legacy_seresnet{depth}'] = _described(depth, placement='branch_after_relu')
    for (authors, legacy), description in caffe.items():
        description |= {'attention': 'se', **_CAFFE}
        if authors:
            _register(authors, description, paper='arXiv 1709.01507', names=_LEGACY_NAMES)
        _register(
            legacy,
            {**description, 'dropout_rate': 0.2},  # timm's default for all of them
            paper='arXiv 1709.01507, as timm has it',
            names=_LEGACY_NAMES,
        )


def _register_byob() -> None:
    """Tiered stems, mechanisms in the middle of the bottleneck: byobnet.py of timm."""
    common = {**_T, 'shortcut': 'conv', 'initialization': 'byob', **_TIMM}
    silu = {'activation': 'silu', **common}
    narrow = {**silu, 'stem_pool': 'none', 'widths': (64, 128, 384, 384), 'features': 1280}
    narrow |= {'block': 'bottleneck', 'depths': (2, 3, 3, 2)}
    backbones = {
        'resnet33ts': narrow,
        'resnext26ts': _described(26, group_width=32, **silu),
        'resnext50ts': _described(50, group_width=32, **silu),
        'resnet50t': _described(50, stem_pool='none', **common),
    }
    gc = {'reduction': 8, 'norm_eps': 1e-6}
    for prefix, attention, arguments, which in (
        ('', None, None, ('resnet33ts', 'resnext26ts')),
        ('gc', 'gc', gc, ('resnet33ts', 'resnext26ts', 'resnext50ts', 'resnet50t')),
        ('se', 'se', {'hidden_divisor': 8}, ('resnet33ts', 'resnext26ts')),
        ('eca_', 'eca', _ADAPTIVE, ('resnet33ts', 'resnext26ts')),
    ):
        for backbone in which:
            description = {**backbones[backbone], 'attention': attention}
            if attention:
                description |= {'placement': 'mid', 'attention_args': arguments}
            _register(
                f'{prefix}{backbone}',
                description,
                paper='as timm has it',
                input_size=(256, 256),
                names=_BYOB_NAMES,
            )


def _register_authors() -> None:
    """A mechanism after each block's last norm, or after each stage."""
    for depth in (18, 34, 50, 101, 152):
        register_model(
            f'eca_resnet{depth}',
            _eca(depth),
            family='resnet',
            torch_names=torch_names,
            paper='arXiv 1910.03151',
        )
    for attention, paper, depths in (
        ('cbam', 'arXiv 1807.06521', (18, 34, 50, 101)),
        ('bam', 'arXiv 1807.06514', (18, 34, 50, 101)),
        ('triplet', 'arXiv 2010.03045', (18, 34, 50, 101)),
    ):
        for depth in depths:
            _register(
                f'{attention}_resnet{depth}',
                _described(depth, attention=attention, initialization='cbam'),
                paper=paper,
                names=Naming(scheme='models' if attention == 'triplet' else None),
            )
    paper = 'arXiv 1904.11492'
    for depth in (50, 101):
        for reduction in (16, 4):
            _register(
                f'gc_resnet{depth}_r{reduction}',
                _described(depth, attention='gc', attention_args={'reduction': reduction}),
                paper=paper,
            )
        _register(f'gc_resnet{depth}', _described(depth, attention='gc'), paper=paper)
    _register(
        'gc_resnet50_r16_all', _described(50, attention='gc', placement='branch'), paper=paper
    )


def _register_inserted() -> None:
    """Modules of their own between the blocks: Non-local, A2, CGNL; two of them for videos."""
    paper = 'arXiv 1711.07971'
    non_local = {'attention': 'non_local', 'initialization': 'non_local'}
    for name, depth, placement in (
        ('nl_resnet50_1', 50, 'before_block@3:5'),
        ('nl_resnet50_5', 50, None),
        ('nl_resnet50_10', 50, _NON_LOCAL_TEN),
        ('nl_resnet101_5', 101, None),
    ):
        _register(name, _described(depth, placement=placement, **non_local), paper=paper)
    _register(
        'nl_resnet50_1_cgnl',
        _described(
            50,
            attention='non_local',
            placement='before_block@3:5',
            attention_args={'use_bias': False, 'pool_size': 1, 'scale': None},
        ),
        paper=f'{paper}, as KaiyuYue/cgnl-network.pytorch has it',
    )
    double = {'attention': 'double_attention', 'attention_args': {'reduction': 2}}
    for reduction in (2, 4):
        _register(
            f'a2_resnet50_5_d{reduction}',
            _described(50, attention='double_attention', attention_args={'reduction': reduction}),
            paper='arXiv 1810.11579',
        )
    video = {'spatial_dims': 3, 'dropout_rate': 0.5}
    _register('nl_resnet50_5_video', _described(50, **non_local, **video), paper=paper)
    _register('a2_resnet50_5_video', _described(50, **double, **video), paper='arXiv 1810.11579')
    cgnl = {'attention': 'cgnl', 'initialization': 'cgnl', 'dropout_rate': 0.5}
    for depth in (50, 101, 152):
        _register(f'cgnl_resnet{depth}_1', _described(depth, **cgnl), paper='arXiv 1810.13125')
    five = _described(50, placement='after_block@2:1,3+3:1,3,5', **cgnl)
    _register('cgnl_resnet50_5', five, paper='arXiv 1810.13125')


def _register_gsop() -> None:
    """One module in the last block of each stage; the last stage keeps its resolution."""
    modes = {
        '': 'channel',
        '_average': 'fusion_avg',
        '_concat': 'fusion_concat',
        '_max': 'fusion_max',
        '_position': 'position',
    }
    for depth in (50, 101):
        description = _described(depth, attention='gsop', strides=(1, 2, 2, 1))
        for suffix, mode in modes.items():
            if suffix and depth > 50:
                continue
            arguments = tuple({'mode': mode, 'strides': s} for s in (2, 1, 1, 1))
            _register(
                f'gsop_net1_resnet{depth}{suffix}',
                {**description, 'attention_args': arguments},
                paper='arXiv 1811.12006',
            )
        arguments = tuple({'strides': s} for s in (2, 1, 1, 1))
        description |= {
            'attention_args': arguments,
            'placement': 'last_block@1+2+3',
            'pool': 'isqrt_cov',
            'pool_args': {'iterations': 3, 'triangle': 'lower'},
        }
        _register(f'gsop_net2_resnet{depth}', description, paper='arXiv 1811.12006')


def _register_sk() -> None:
    next_ = {'attention': 'sk', 'cardinality': 32, 'base_width': 4}
    names = Naming(backbone='timm_sk')
    paper = 'arXiv 1903.06586'
    _register('sknet50', _described(50, **next_), paper=paper, names=names)
    released = ({}, {'hidden': 16}, {}, {})
    _register(
        'sknet101', _described(101, attention_args=released, **next_), paper=paper, names=names
    )
    timm = {
        f'skresnet{depth}': _described(
            depth,
            attention='sk',
            placement='conv1',
            attention_args=_variant('sk', 'timm_skresnet'),
        )
        for depth in (18, 34)
    }
    split = {'attention': 'sk', 'attention_args': _variant('sk', 'timm')}
    timm['skresnet50'] = _described(50, **split)
    timm['skresnet50d'] = _described(50, **_D, **split)
    timm['skresnext50_32x4d'] = _described(
        50, attention_args=_variant('sk', 'timm_skresnext'), **next_
    )
    for name, description in timm.items():
        _register(name, description, paper=f'{paper}, as timm has it', names=names)


def _register_resnest() -> None:
    paper = 'arXiv 2004.08955'
    for depth in (14, 26, 50, 101, 200, 269):
        size = {101: 256, 200: 320, 269: 416}.get(depth, 224)
        suffix = 'd' if depth <= 50 else 'e'
        description = _resnest(depth, radix=2)
        facts = {'input_size': (size, size)}
        _register(f'resnest{depth}', description, paper=paper, **facts)
        _register(
            f'resnest{depth}{suffix}',
            {**description, **_TIMM},
            paper=f'{paper}, as timm has it',
            **facts,
        )
    for text in ('1s1x64d', '2s1x64d', '4s1x64d', '1s2x40d', '2s2x40d', '4s2x40d', '1s4x24d'):
        radix, rest = text.removesuffix('d').split('s')
        groups, width = map(int, rest.split('x'))
        description = _resnest(50, radix=int(radix), groups=groups, width=width, fast=True)
        _register(f'resnest50_fast_{text}', description, paper=paper)
        if text in ('4s2x40d', '1s4x24d'):
            _register(
                f'resnest50d_{text}',
                {**description, **_TIMM},
                paper=f'{paper}, as timm has it',
            )


def _resnest(
    depth: int, *, radix: int, groups: int = 1, width: int = 64, fast: bool = False
) -> dict[str, Any]:
    """ResNeSt; `fast` pools before the strided split attention and not after it."""
    stem = _D if depth <= 50 else {**_D, **_S}
    return _described(
        depth,
        attention='split_attention',
        attention_args={'radix': radix, 'groups': groups},
        cardinality=groups,
        base_width=width,
        conv2_pool='before' if fast else 'after',
        **stem,
    )


def _register_cifar() -> None:
    small = {'input_size': (32, 32), 'num_classes': 10}
    cifar = {
        'block': 'basic',
        'widths': (16, 32, 64),
        'stem': 'cifar',
        'stem_widths': (16,),
        'shortcut': 'pad',
        'initialization': 'cifar',
    }
    for depth in _CIFAR_DEPTHS:
        depths = ((depth - 2) // 6,) * 3
        paper = 'arXiv 1512.03385, section 4.2'
        description = {**cifar, 'depths': depths, 'num_classes': 10}
        _register(f'cifar_resnet{depth}', description, paper=paper, **small)
        option_b = {**description, 'shortcut': 'conv'}
        _register(f'cifar_resnet{depth}_b', option_b, paper=paper, **small)
        if depth <= 56:
            _register(
                f'cifar_se_resnet{depth}',
                {**option_b, 'attention': 'se', 'attention_args': {'use_bias': False}},
                paper='arXiv 1709.01507, as moskomule/senet.pytorch has it',
                **small,
            )
    wide = {'stem': 'cifar', 'initialization': 'cbam', 'num_classes': 100}
    small = {'input_size': (32, 32), 'num_classes': 100}
    for depth in (18, 50):
        paper = 'arXiv 1807.06521, CIFAR-100'
        _register(f'cifar_wide_resnet{depth}', _described(depth, **wide), paper=paper, **small)
        for attention in ('cbam', 'bam'):
            _register(
                f'cifar_{attention}_resnet{depth}',
                _described(depth, attention=attention, **wide),
                paper=paper,
                **small,
            )
    _register(
        'tiny_resnet',
        {**cifar, 'depths': (1, 1, 1), 'num_classes': 10},
        paper='one block a stage, for tests and quick runs',
        input_size=(32, 32),
        num_classes=10,
    )


_register_all()
