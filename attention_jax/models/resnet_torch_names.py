"""The names that PyTorch's ResNets give their weights: torchvision's, timm's and the authors'."""

import dataclasses
from collections.abc import Mapping

from attention_jax.models.attach import mechanism_names
from attention_jax.models.resnet import ResNet
from attention_jax.modules.registry import ForeignName, TorchName, TorchNames, attention_entry

Names = Mapping[str, TorchName]

# The place of a mechanism in the names of released networks.
_PREFIXES = {
    'se': ('se', 'se_module'),
    'eca': ('eca', 'se'),
    'gc': ('context_block',),
    'triplet': ('triplet_attention',),
    'gsop': ('',),
}
# What stands between the blocks and keeps its mechanism one level down.
_INSERTED = {'double_attention': 'a2.'}


@dataclasses.dataclass(frozen=True)
class Naming:
    """What the names of a network's weights are, where a ResNet's fields do not say it.

    Attributes:
        backbone: 'torchvision' (timm's ResNet and most authors' too), 'legacy' (timm's senet.py),
            'timm_sk' (its sknet.py) or 'byob' (its byobnet.py).
        prefix: where a block keeps its mechanism; None: all places that are known.
        scheme: the mechanism's naming scheme that comes first; None: its authors'.
    """

    backbone: str = 'torchvision'
    prefix: str | None = None
    scheme: str | None = None


def torch_names(network: ResNet, *, naming: Naming = Naming()) -> TorchNames:
    """Names of weights in the PyTorch ResNets: those of this network as `naming` says."""
    inner: dict[str, tuple[str, Names]] = {naming.backbone: ('', {})}
    if sites := network.sites():
        tables = mechanism_names(network.attention, sites)
        prefixes = _PREFIXES.get(network.attention, (network.attention,))
        if naming.prefix is not None:
            prefixes = (naming.prefix, *(p for p in prefixes if p != naming.prefix))
        schemes = sorted(tables, key=lambda scheme: scheme != naming.scheme)  # the others in order
        inner = {
            f'{scheme}.{prefix or naming.backbone}': (prefix, tables[scheme])
            for prefix in prefixes
            for scheme in schemes
        }
    found: dict[str, Names] = {}
    for scheme, (prefix, table) in inner.items():
        if naming.backbone == 'byob':
            found[scheme] = _byob(network, prefix, table)
            continue
        found[scheme] = _torchvision(network, prefix, table, naming.backbone)
        if network.stem == 'cifar':
            found[f'{scheme}.cifar'] = _torchvision(network, prefix, table, 'cifar')
    return found


def _torchvision(network: ResNet, prefix: str, table: Names, backbone: str) -> Names:
    """`layerS.B.convI`, `.bnI`, `.downsample`, with what the backbones call otherwise."""
    shortcut = 'shortcut' if backbone == 'cifar' else 'downsample'
    head = {'cifar': 'linear', 'legacy': 'last_linear'}.get(backbone, 'fc')
    conv, norm = ('.conv', '.bn') if backbone == 'timm_sk' else ('', '')
    names: dict[ForeignName, TorchName] = {f'{head}.*': 'head/*'}
    root = 'layer0.' if backbone == 'legacy' else ''
    if network.stem == 'deep' and backbone != 'legacy':
        for i, (theirs, after) in enumerate((('0', '1'), ('3', '4'), ('6', None)), 1):
            names[f'conv1.{theirs}.*'] = f'stem_conv{i}/*'
            names[f'conv1.{after}.*' if after else 'bn1.*'] = f'stem_norm{i}/*'
    else:
        for i in range(1, len(network.stem_widths) + 1):
            names[f'{root}conv{i}.*'] = f'stem_conv{i}/*'
            names[f'{root}bn{i}.*'] = f'stem_norm{i}/*'
    if network.pool == 'isqrt_cov':
        heads = attention_entry('isqrt_cov').torch_names
        names['**'] = ('pool/**', heads['gsop_net2'])

    first = 1 if network.shortcut == 'avg' else 0  # the pool takes a number
    sites = network.sites()
    below = _INSERTED.get(network.attention, '')
    inserted = 0
    for s, depth in enumerate(network.depths):
        position = 0
        for b in range(depth):
            block = f'stage{s + 1}_block{b}'
            here = sites.get(block, {})
            if 'before_block' in here:  # a block of theirs, which shifts the numbers after it
                between = f'layer{s + 1}.{position}.{below}**'
                names[between] = (f'{block}_before_block_attention/**', table)
                position += 1
            theirs = f'layer{s + 1}.{position}'
            for i in range(1, (2 if network.block == 'basic' else 3) + 1):
                if f'conv{i}' in here:
                    names[f'{theirs}.conv{i}.**'] = (f'{block}/conv{i}/**', table)
                    continue
                inner = f'{theirs}.conv{i}'
                names[f'{inner}{conv}.*'] = f'{block}/conv{i}/*'
                names[f'{inner}{norm}.*' if norm else f'{theirs}.bn{i}.*'] = f'{block}/norm{i}/*'
            names[f'{theirs}.{shortcut}.{first}.*'] = f'{block}/shortcut_conv/*'
            names[f'{theirs}.{shortcut}.{first + 1}.*'] = f'{block}/shortcut_norm/*'
            within = f'{theirs}.{prefix}' if prefix else theirs
            names[f'{within}.**'] = (f'{block}/attention/**', table)
            position += 1
            if 'after_block' in here:
                between = f'layer{s + 1}.{position}.{below}**'
                names[between] = (f'{block}_after_block_attention/**', table)
                position += 1
            if 'stage' in here:
                inserted += 1
                names[f'{prefix}{inserted}.**'] = (f'{block}_stage_attention/**', table)
    return names


def _byob(network: ResNet, prefix: str, table: Names) -> Names:
    """`stages.S.B.conv1_1x1.conv`, each convolution with its norm."""
    names: dict[ForeignName, TorchName] = {'head.fc.*': 'head/*'}

    def pair(theirs: str, conv: str, norm: str) -> None:
        names[f'{theirs}.conv.*'] = conv
        names[f'{theirs}.bn.*'] = norm

    for i in range(1, len(network.stem_widths) + 1):
        pair(f'stem.conv{i}', f'stem_conv{i}/*', f'stem_norm{i}/*')
    pair('final_conv', 'features_conv/*', 'features_norm/*')
    for s, depth in enumerate(network.depths):
        for b in range(depth):
            block, theirs = f'stage{s + 1}_block{b}', f'stages.{s}.{b}'
            pair(f'{theirs}.shortcut', f'{block}/shortcut_conv/*', f'{block}/shortcut_norm/*')
            for i, layer in enumerate(('conv1_1x1', 'conv2_kxk', 'conv3_1x1'), 1):
                pair(f'{theirs}.{layer}', f'{block}/conv{i}/*', f'{block}/norm{i}/*')
            names[f'{theirs}.{prefix}.**'] = (f'{block}/attention/**', table)
    return names
