"""Where a mechanism sits in a network: a text that people write, and the table of sites it means.

In a backbone of stages the text is `WHERE` or `WHERE@STAGES`, the stages counted from 1 and joined
by `+`, each with the 0-based blocks it means after a colon: `branch`, `branch@2+3+4`,
`after_block@2:1,3+3:1,3,5`. In the neck of a detector it is places joined by `+`: `feat1+feat2`.
The same text serves Python, configs and the command line.

A network reads it once, with `resolve` or `resolve_neck`; each of its parts is then told what
stands at its own places, and knows nothing of texts, stages and defaults.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attention_jax.modules.registry import AttentionEntry, attention_entry

Arguments = Mapping[str, Any]  # of a mechanism
Sites = Mapping[str, Mapping[str, Arguments]]  # part of a network -> place there -> its arguments

WHERE = {
    'branch': 'on the residual branch after its last norm, before the sum',
    'branch_after_relu': 'as branch, after one more ReLU (the first PyTorch SE-ResNets)',
    'mid': 'in a bottleneck, after the norm and activation of its 3x3',
    'conv2_pre_norm': 'between the second convolution of a block and its norm',
    'conv1': 'in place of the first convolution of a block, with its stride',
    'conv2': 'in place of the second convolution of a block',
    'pre_conv': 'before every convolution, those of the stem and the shortcut included',
    'expanded': (
        'in an inverted residual, after the norm and activation of the depthwise convolution; '
        'without stages not in the first, which does not expand'
    ),
    'output': 'after the last norm of an inverted residual, before the sum where there is one',
    'depthwise_pre_norm': 'in an inverted residual, between the depthwise convolution and its norm',
    'last_block': 'as branch or output, in the last block of each stage only',
    'stage': 'after the last block of each stage but the last',
    'before_block': 'a residual module of its own before a block',
    'after_block': 'a residual module of its own after a block',
}
_INVERTED = ('expanded', 'output', 'depthwise_pre_norm')
_BETWEEN = ('last_block', 'stage', 'before_block', 'after_block')
PLACES = {
    'ResNet': tuple(where for where in WHERE if where not in _INVERTED),
    'MobileNetV2': _INVERTED + _BETWEEN,
}
NECK = {
    'feat1': "on the backbone's map of stride 16, before it is joined with the upsampled one",
    'feat2': "on the backbone's last map, of stride 32",
    'upsampled': 'on the map that is enlarged to stride 16, before it is joined',
}
# Places of ResNet -> what stands for them in a backbone, where it is called otherwise.
_COUNTERPARTS = {
    'ResNet': {'branch': 'branch'},
    'MobileNetV2': {'branch': 'output', 'conv2_pre_norm': 'depthwise_pre_norm'},
}
_PATTERN = re.compile(r'(?P<where>\w+)(@(?P<stages>\d+(:\d+(,\d+)*)?(\+\d+(:\d+(,\d+)*)?)*))?')


class Placement(NamedTuple):
    """A parsed placement in a backbone."""

    where: str  # a key of `WHERE`, 'last_block' apart
    blocks: tuple[frozenset[int], ...]  # for each stage, the 0-based blocks that are meant


def resolve(
    attention: str | None,
    text: str | None,
    arguments: Arguments | Sequence[Arguments] | None,
    depths: Sequence[int],
    block: str,
    backbone: str = 'ResNet',
) -> Sites:
    """The sites of a mechanism in a backbone, checked against the mechanism.

    Args:
        attention: registry name of the mechanism, or None.
        text: the placement; None is the mechanism's default.
        arguments: of the mechanism, the same in all stages, or one mapping a stage.
        depths: number of blocks of each stage.
        block: the backbone's kind of block, such as 'bottleneck'.
        backbone: key of `PLACES`.

    Returns:
        `stem`, `stage1_block0`, ... -> place -> arguments; only what the mechanism is in, so
        nothing without one.

    Raises:
        ValueError: what the backbone lacks, or where the mechanism does not fit.
    """
    if attention is None:
        if arguments:
            raise ValueError('attention_args need attention, got attention=None')
        if text is not None:
            raise ValueError('placement needs attention, got attention=None')
        return {}
    by_stage = _each(arguments, len(depths), 'stage')
    entry = attention_entry(attention)
    text = text or default(entry, depths, block, backbone)
    placement = parse(text, depths, backbone)
    where = placement.where
    replaces = where in ('conv1', 'conv2')
    if replaces and not entry.replaces_convolution:
        raise ValueError(
            f'placement {text!r} puts attention in place of a convolution, which '
            f'{attention!r} is not: try branch'
        )
    if not replaces and (entry.replaces_convolution or not entry.preserves_shape):
        raise ValueError(
            f'placement {text!r} needs attention that keeps its input, {attention!r} '
            f'replaces a convolution or changes the shape: try conv2 in a ResNet'
        )
    if where == 'mid' and block != 'bottleneck':
        raise ValueError(f'placement {text!r} needs bottlenecks, block is {block!r}')
    sites = {'stem': {where: by_stage[0]}} if where == 'pre_conv' else {}
    for s, blocks in enumerate(placement.blocks):
        sites |= {f'stage{s + 1}_block{b}': {where: by_stage[s]} for b in sorted(blocks)}
    return sites


def resolve_neck(
    attention: str | None,
    text: str | None,
    arguments: Arguments | Sequence[Arguments] | None,
) -> Sites:
    """The sites of a mechanism in the neck of YOLOv4-tiny, checked against the mechanism.

    Args:
        attention: registry name of the mechanism, or None.
        text: keys of `NECK`, joined by `+`; None is all of them.
        arguments: of the mechanism, the same everywhere, or one mapping a place of `text`.

    Returns:
        `neck` -> place, in the order of `text` -> arguments; nothing without a mechanism.

    Raises:
        ValueError: a text that cannot be read, arguments that do not fit it, or a mechanism that
            changes its input's shape, takes several maps or stands for a convolution.
    """
    if attention is None:
        for name, given in (('placement', text), ('attention_args', arguments)):
            if given:
                raise ValueError(f'{name} needs attention, got attention=None')
        return {}
    entry = attention_entry(attention)
    if entry.placement == 'none' or entry.replaces_convolution or not entry.preserves_shape:
        raise ValueError(
            f'attention {attention!r} changes the shape, takes several maps or replaces a '
            f'convolution: the neck of YOLOv4-tiny needs one that returns its input gated, '
            f'such as se'
        )
    places = (text or '+'.join(NECK)).split('+')
    if len(set(places)) != len(places) or not set(places) <= set(NECK):
        raise ValueError(
            f'placement {text!r} cannot be read: join some of {", ".join(NECK)} '
            f'by +, each once, for example feat1+feat2'
        )
    by_place = _each(arguments, len(places), 'place', f' ({", ".join(places)})')
    return {'neck': dict(zip(places, by_place, strict=True))}


def parse(text: str, depths: Sequence[int], backbone: str = 'ResNet') -> Placement:
    """Reads a placement for a backbone, a key of `PLACES`, with `depths` blocks in its stages.

    Raises:
        ValueError: the text cannot be read, or means what the backbone lacks.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f'placement {text!r} cannot be read: write WHERE or WHERE@STAGES, for example '
            f'branch, branch@2+3+4 or after_block@2:1,3+3:1,3,5'
        )
    where = match['where']
    if where not in PLACES[backbone]:
        elsewhere = [other for other, places in PLACES.items() if where in places]
        what = f'belongs to {elsewhere[0]}, not to {backbone}' if elsewhere else 'is unknown'
        raise ValueError(f'placement {where!r} {what}: use one of {", ".join(PLACES[backbone])}')
    if match['stages'] is None:
        stages = {s: range(depth) for s, depth in enumerate(depths)}
        if where == 'stage':
            del stages[len(depths) - 1]
        elif where == 'expanded':
            del stages[0]
    else:
        stages = {}
        for part in match['stages'].split('+'):
            stage, _, blocks = part.partition(':')
            if not 1 <= int(stage) <= len(depths):
                raise ValueError(
                    f'placement {text!r} means stage {stage}, the backbone has 1 to {len(depths)}'
                )
            depth = depths[int(stage) - 1]
            chosen = [int(b) for b in blocks.split(',')] if blocks else range(depth)
            if not all(b < depth for b in chosen):
                raise ValueError(
                    f'placement {text!r} means block {max(chosen)} of stage {stage}, '
                    f'which has blocks 0 to {depth - 1}'
                )
            stages[int(stage) - 1] = chosen
    if where in ('stage', 'last_block'):
        stages = {s: [depths[s] - 1] for s in stages}
        where = _COUNTERPARTS[backbone]['branch'] if where == 'last_block' else where
    return Placement(where, tuple(frozenset(stages.get(s, ())) for s in range(len(depths))))


def default(
    entry: AttentionEntry, depths: Sequence[int], block: str, backbone: str = 'ResNet'
) -> str:
    """The placement that the mechanism's authors use, for a backbone that was not told one.

    An entry names a place of ResNet, or one of: `branch_but_first` (no first stage), `inserted`
    (the five blocks of the non-local networks in bottleneck ResNets of 50 layers and more, else one
    after the last block of the last stage but one), `inserted_before` (one before the last block
    of that stage). In MobileNetV2 `output` stands for `branch`, as in the networks of ECA and
    Triplet, and `depthwise_pre_norm` for `conv2_pre_norm`, as in SimAM's. The arguments are those
    of `resolve`.

    Raises:
        ValueError: the mechanism is a head, takes several maps or stands for a convolution that the
            backbone lacks, so that no place suits it.
    """
    count = len(depths)
    deep = block == 'bottleneck' and count == 4 and 3 * sum(depths) + 2 >= 50
    stage = count - 1  # the last but one, counted from 1
    last = depths[stage - 1] - 1
    place = _COUNTERPARTS[backbone].get(entry.placement, entry.placement)
    match place:
        case 'none':
            raise ValueError(
                f'attention {entry.name!r} has no place inside a backbone: build it with '
                f'create_attention and call it on the feature maps it takes'
            )
        case 'branch_but_first':
            later = '+'.join(str(s) for s in range(2, count + 1))
            return f'{_COUNTERPARTS[backbone]["branch"]}@{later}'
        case 'inserted' if deep:
            return f'after_block@2:{_spread(depths[1], 2)}+3:{_spread(depths[2], 3)}'
        case 'inserted_before' if deep:
            return f'before_block@{stage}:{last}'
        case 'inserted' | 'inserted_before':
            return f'after_block@{stage}:{last}'
    if place not in PLACES[backbone]:
        raise ValueError(
            f'attention {entry.name!r} has no place in {backbone}, whose blocks lack '
            f'{place!r}: use it in a ResNet'
        )
    return place


def _spread(depth: int, number: int) -> str:
    """The blocks after which `number` modules follow, evenly: 1, 3, 5 of 6; 6, 13, 20 of 23."""
    return ','.join(str(depth // number * (i + 1) - 1) for i in range(number))


def _each(
    arguments: Arguments | Sequence[Arguments] | None, count: int, unit: str, names: str = ''
) -> tuple[Arguments, ...]:
    """A mechanism's arguments in each of `count` stages or places."""
    arguments = arguments or {}
    if isinstance(arguments, Mapping):
        return (arguments,) * count
    if len(arguments) != count:
        raise ValueError(
            f'attention_args must be one dict or one a {unit}: {count} {unit}s{names}, '
            f'got {len(arguments)}'
        )
    return tuple(arguments)
