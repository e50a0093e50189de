"""The named ResNets: each a description of `ResNet`, and the names PyTorch gives their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax import checks, registry
from attention_jax.models.resnet import ResNet

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
}
_D = {'stem': 'deep', 'stem_widths': (32, 32, 64), 'shortcut': 'avg'}
_V1 = {'stride_in': 'conv1'}
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


def resnet(**arguments: Any) -> ResNet:
    """Builds a `ResNet`; an unknown argument is a ValueError that lists the known ones."""
    registry.check_arguments('this network', arguments, registry.fields(ResNet))
    return ResNet(**arguments)


def _register(name: str, description: Mapping[str, Any], **facts: Any) -> None:
    def build(**arguments: Any) -> ResNet:
        return _build(description, arguments)

    registry.register_model(name, build, family='resnet', torch_names=torch_names, **facts)


def _build(description: Mapping[str, Any], arguments: Mapping[str, Any]) -> ResNet:
    """The described network, with what the caller changes in it."""
    merged = {**description, **arguments}
    if merged.get('attention') != description.get('attention'):
        # Another mechanism: its own place and arguments, not those of the described one.
        for key in {'placement', 'attention_args'} - set(arguments):
            merged.pop(key, None)
    return resnet(**merged)


def _described(depth: int, **more: Any) -> dict[str, Any]:
    block, depths = _DEPTHS[depth]
    return {'block': block, 'depths': depths, **more}


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
        return _build(description, arguments)

    return build


def _register_all() -> None:
    for depth in (18, 26, 34, 50, 101, 152):
        _register(f'resnet{depth}', _described(depth), paper='arXiv 1512.03385')
    for depth in (50, 101, 152):
        _register(f'resnet{depth}_v1', _described(depth, **_V1), paper='arXiv 1512.03385')
    for depth in (18, 26, 34, 50, 101, 152, 200):
        _register(
            f'resnet{depth}d',
            _described(depth, zero_init_last=True, **_D),
            paper='arXiv 1812.01187, as timm has it',
            input_size=(256, 256) if depth >= 101 else (224, 224),
        )
    _register(
        'resnet50c',
        _described(50, zero_init_last=True, stem='deep', stem_widths=(32, 32, 64)),
        paper='arXiv 1812.01187, as timm has it',
    )
    for cardinality, base_width, depth in ((32, 4, 50), (32, 4, 101), (32, 8, 101), (64, 4, 101)):
        _register(
            f'resnext{depth}_{cardinality}x{base_width}d',
            _described(depth, cardinality=cardinality, base_width=base_width),
            paper='arXiv 1611.05431',
        )
    _register('wide_resnet50_2', _described(50, base_width=128), paper='arXiv 1605.07146')

    for depth in (18, 34, 50, 101, 152):
        _register(
            f'se_resnet{depth}',
            _described(depth, attention='se', attention_args={'use_bias': False}),
            paper='arXiv 1709.01507, as moskomule/senet.pytorch has it',
        )
        _register(
            f'seresnet{depth}',
            _described(
                depth, attention='se', attention_args={'hidden_divisor': 8}, zero_init_last=True
            ),
            paper='arXiv 1709.01507, as timm has it',
        )
        registry.register_model(
            f'eca_resnet{depth}',
            _eca(depth),
            family='resnet',
            torch_names=torch_names,
            paper='arXiv 1910.03151',
        )
    _register(
        'se_resnet50_srm',
        _described(50, attention='se'),
        paper='arXiv 1709.01507, as hyunjaelee410/style-based-recalibration-module has it',
    )
    for depth in (18, 34, 50, 101):
        _register(
            f'cbam_resnet{depth}',
            _described(depth, attention='cbam', initialization='cbam'),
            paper='arXiv 1807.06521',
        )
    for depth in (50, 101):
        for reduction in (16, 4):
            _register(
                f'gc_resnet{depth}_r{reduction}',
                _described(depth, attention='gc', attention_args={'reduction': reduction}),
                paper='arXiv 1904.11492',
            )
        _register(f'gc_resnet{depth}', _described(depth, attention='gc'), paper='arXiv 1904.11492')
    _register(
        'gc_resnet50_r16_all',
        _described(50, attention='gc', placement='branch'),
        paper='arXiv 1904.11492',
    )
    non_local = {'attention': 'non_local', 'initialization': 'non_local'}
    for name, depth, placement in (
        ('nl_resnet50_1', 50, 'before_block@3:5'),
        ('nl_resnet50_5', 50, None),
        ('nl_resnet50_10', 50, _NON_LOCAL_TEN),
        ('nl_resnet101_5', 101, None),
    ):
        _register(
            name, _described(depth, placement=placement, **non_local), paper='arXiv 1711.07971'
        )
    _register(
        'nl_resnet50_1_cgnl',
        _described(
            50,
            attention='non_local',
            placement='before_block@3:5',
            attention_args={'use_bias': False, 'pool_size': 1, 'scale': None},
        ),
        paper='arXiv 1711.07971, as KaiyuYue/cgnl-network.pytorch has it',
    )

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
        _register(
            f'cifar_cbam_resnet{depth}',
            _described(depth, attention='cbam', **wide),
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


# The place of a mechanism in the names of released networks.
_ATTENTION_NAMES = {
    'se': ('se', 'se_module'),
    'eca': ('eca', 'se'),
    'gc': ('context_block',),
    'triplet': ('triplet_attention',),
}


def torch_names(network: ResNet) -> registry.TorchNames:
    """Names of weights in the PyTorch ResNets: torchvision's, timm's and the authors'.

    Args:
        network: the ResNet; blocks that stand between others shift the numbers after them.

    Returns:
        Naming scheme -> foreign name -> our path.
    """
    schemes: dict[str, Mapping[str, registry.TorchName]] = {}
    if network.attention is None:
        inner: dict[str, tuple[str, Mapping[str, registry.TorchName]]] = {'torchvision': ('', {})}
    else:
        entry = registry.attention_entry(network.attention)
        module = registry.create_attention(entry.name, **network.stage_arguments()[-1])
        names = entry.torch_names(module) if callable(entry.torch_names) else entry.torch_names
        prefixes = _ATTENTION_NAMES.get(entry.name, (entry.name,))
        inner = {
            f'{scheme}.{prefix}': (prefix, table)
            for prefix in prefixes
            for scheme, table in names.items()
        }
    for scheme, (prefix, table) in inner.items():
        schemes[scheme] = _names(network, prefix, table, shortcut='downsample', head='fc')
        if network.stem == 'cifar':
            schemes[f'{scheme}.cifar'] = _names(
                network, prefix, table, shortcut='shortcut', head='linear'
            )
    return schemes


def _names(
    network: ResNet,
    prefix: str,
    table: Mapping[str, registry.TorchName],
    *,
    shortcut: str,
    head: str,
) -> dict[str, registry.TorchName]:
    names: dict[str, registry.TorchName] = {f'{head}.*': 'head/*'}
    if network.stem == 'deep':
        for i, (conv, norm) in enumerate((('0', '1'), ('3', '4'), ('6', None)), 1):
            names[f'conv1.{conv}.*'] = f'stem_conv{i}/*'
            names[f'conv1.{norm}.*' if norm else 'bn1.*'] = f'stem_norm{i}/*'
    else:
        names |= {'conv1.*': 'stem_conv1/*', 'bn1.*': 'stem_norm1/*'}
    pool = network.shortcut == 'avg'
    placement = network.resolved_placement()
    for s, depth in enumerate(network.depths):
        position = 0
        for b in range(depth):
            block = f'stage{s + 1}_block{b}'
            if placement and placement.at('before_block', s, b):
                names[f'layer{s + 1}.{position}.**'] = (f'{block}_before_block_attention/**', table)
                position += 1
            theirs = f'layer{s + 1}.{position}'
            for i in range(1, 3 if network.block == 'basic' else 4):
                names[f'{theirs}.conv{i}.*'] = f'{block}/conv{i}/*'
                names[f'{theirs}.bn{i}.*'] = f'{block}/norm{i}/*'
            names[f'{theirs}.{shortcut}.{int(pool)}.*'] = f'{block}/shortcut_conv/*'
            names[f'{theirs}.{shortcut}.{int(pool) + 1}.*'] = f'{block}/shortcut_norm/*'
            names[f'{theirs}.{prefix}.**'] = (f'{block}/attention/**', table)
            position += 1
            if placement and placement.at('after_block', s, b):
                names[f'layer{s + 1}.{position}.**'] = (f'{block}_after_block_attention/**', table)
                position += 1
    return names


_register_all()
