"""The names that PyTorch's MobileNetV2s give their weights: torchvision's, timm's and others'."""

from collections.abc import Collection, Iterator, Mapping

from attention_jax.models.attach import mechanism_names
from attention_jax.models.mobilenet import MobileNetV2
from attention_jax.modules.registry import TorchName, TorchNames


def torch_names(network: MobileNetV2) -> TorchNames:
    """Names of weights in the PyTorch MobileNetV2s.

    'torchvision' is also ECA's and Triplet's, 'simam' that of ZjjConan/SimAM; 'flat' (d-li14, the
    coordinate attention authors) numbers the layers of a block in one sequence. timm knows a
    mechanism on the expanded channels only, as `se`; elsewhere it is called so too.
    """
    tables: Mapping[str, Mapping[str, TorchName]] = {'': {}}
    if sites := network.sites():
        names = mechanism_names(network.attention, sites)
        tables = {f'.{scheme}': table for scheme, table in names.items()}
    return {
        f'{style}{scheme}': _names(network, style, table)
        for scheme, table in tables.items()
        for style in ('torchvision', 'simam', 'flat', 'timm')
    }


def _names(
    network: MobileNetV2, style: str, table: Mapping[str, TorchName]
) -> dict[str, TorchName]:
    names: dict[str, TorchName] = {}
    sites = network.sites()
    index = 1  # of a block in one sequence for all, after the stem
    for s, (expansion, _, depth, _) in enumerate(network.rows):
        position = 0  # of a block in timm's sequence of a stage
        for b in range(depth):
            ours = f'stage{s + 1}_block{b}'
            here = sites.get(ours, {})
            for where in ('before_block', 'block', 'after_block', 'stage'):
                theirs = f'blocks.{s}.{position}' if style == 'timm' else f'features.{index}'
                if where in here:
                    names[f'{theirs}.**'] = (f'{ours}_{where}_attention/**', table)
                elif where == 'block':
                    for layer, part in _layers(style, expansion, here):
                        if part == 'attention':
                            names[f'{theirs}.{layer}.**'] = (f'{ours}/attention/**', table)
                        else:
                            names[f'{theirs}.{layer}.*'] = f'{ours}/{part}/*'
                else:
                    continue
                index, position = index + 1, position + 1
    if style == 'timm':
        ends = ('conv_stem', 'bn1', 'conv_head', 'bn2', 'classifier')
    else:
        last = 'conv' if style == 'flat' else f'features.{index}'
        head = 'classifier.0' if style == 'simam' else 'classifier.1'
        ends = ('features.0.0', 'features.0.1', f'{last}.0', f'{last}.1', head)
    layers = ('stem_conv', 'stem_norm', 'features_conv', 'features_norm', 'head')
    return names | {f'{theirs}.*': f'{ours}/*' for theirs, ours in zip(ends, layers, strict=True)}


def _layers(style: str, expansion: int, places: Collection[str]) -> Iterator[tuple[str, str]]:
    """Foreign names and ours of the layers of one block, with a mechanism at some places of it."""
    layers = ('depthwise', 'project') if expansion == 1 else ('expand', 'depthwise', 'project')
    if style == 'timm':
        convs = ('conv_dw', 'conv_pw') if expansion == 1 else ('conv_pw', 'conv_dw', 'conv_pwl')
        for i, (conv, layer) in enumerate(zip(convs, layers, strict=True), 1):
            yield conv, f'{layer}_conv'
            yield f'bn{i}', f'{layer}_norm'
        yield 'se', 'attention'
        return
    parts = [[f'{layer}_conv', f'{layer}_norm', 'relu'] for layer in layers[:-1]]
    if 'depthwise_pre_norm' in places:
        parts[-1].insert(1, 'attention')
    parts += [['attention']] * ('expanded' in places)
    parts += [['project_conv'], ['project_norm']]
    parts += [['attention']] * ('output' in places)
    if style == 'flat':
        parts = [[part] for group in parts for part in group]
    for i, group in enumerate(parts):
        for j, part in enumerate(group):
            if part != 'relu':
                yield f'conv.{i}.{j}' if len(group) > 1 else f'conv.{i}', part
