"""Where a mechanism sits in a backbone, as a text.

`WHERE` or `WHERE@STAGES`, the stages counted from 1 and joined by `+`, each with the 0-based blocks
it means after a colon: `branch`, `branch@2+3+4`, `after_block@2:1,3+3:1,3,5`. The same text serves
Python, configs and the command line.
"""

import dataclasses
import re
from collections.abc import Sequence

from attention_jax.registry import AttentionEntry

WHERE = {
    'branch': 'on the residual branch after its last norm, before the sum',
    'branch_after_relu': 'as branch, after one more ReLU (the first PyTorch SE-ResNets)',
    'last_block': 'as branch, in the last block of each stage only',
    'mid': 'in a bottleneck, after the norm and activation of its 3x3',
    'conv2_pre_norm': 'between the second convolution of a block and its norm',
    'conv1': 'in place of the first convolution of a block, with its stride',
    'conv2': 'in place of the second convolution of a block',
    'pre_conv': 'before every convolution, those of the stem and the shortcut included',
    'stage': 'after the last block of each stage but the last',
    'before_block': 'a residual module of its own before a block',
    'after_block': 'a residual module of its own after a block',
}
_ELSEWHERE = {
    'expanded': 'MobileNetV2',
    'output': 'MobileNetV2',
    'depthwise_pre_norm': 'MobileNetV2',
}
_PATTERN = re.compile(r'(?P<where>\w+)(@(?P<stages>\d+(:\d+(,\d+)*)?(\+\d+(:\d+(,\d+)*)?)*))?')


@dataclasses.dataclass(frozen=True)
class Placement:
    """A parsed placement.

    Attributes:
        where: a key of `WHERE`.
        blocks: for each stage, the 0-based blocks that are meant.
    """

    where: str
    blocks: tuple[frozenset[int], ...]

    def at(self, where: str, stage: int, block: int) -> bool:
        """Whether the mechanism sits at `where` of this 0-based stage and block."""
        return self.where == where and block in self.blocks[stage]


def parse(text: str, depths: Sequence[int]) -> Placement:
    """Reads a placement for a backbone with `depths` blocks in its stages.

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
    if where in _ELSEWHERE:
        raise ValueError(f'placement {where!r} belongs to {_ELSEWHERE[where]}, not to a ResNet')
    if where not in WHERE:
        raise ValueError(f'placement {where!r} is unknown: use one of {", ".join(WHERE)}')
    if match['stages'] is None:
        stages = {s: range(depth) for s, depth in enumerate(depths)}
        if where == 'stage':
            del stages[len(depths) - 1]
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
        where = 'branch' if where == 'last_block' else where
    return Placement(where, tuple(frozenset(stages.get(s, ())) for s in range(len(depths))))


def default(entry: AttentionEntry, depths: Sequence[int], block: str) -> str:
    """The placement that the mechanism's authors use, for a backbone that was not told one.

    An entry names a key of `WHERE`, or one of: `branch_but_first` (no first stage), `inserted` (the
    five blocks of the non-local networks in bottleneck ResNets of 50 layers and more, else one
    after the last block of the last stage but one), `inserted_before` (one before the last block
    of that stage).

    Raises:
        ValueError: the mechanism is a head or takes several maps, so that no place suits it.
    """
    count = len(depths)
    deep = block == 'bottleneck' and count == 4 and 3 * sum(depths) + 2 >= 50
    stage = count - 1  # the last but one, counted from 1
    last = depths[stage - 1] - 1
    match entry.placement:
        case 'none':
            raise ValueError(
                f'attention {entry.name!r} has no place inside a backbone: build it with '
                f'create_attention and call it on the feature maps it takes'
            )
        case 'branch_but_first':
            return 'branch@' + '+'.join(str(s) for s in range(2, count + 1))
        case 'inserted' if deep:
            return f'after_block@2:{_spread(depths[1], 2)}+3:{_spread(depths[2], 3)}'
        case 'inserted_before' if deep:
            return f'before_block@{stage}:{last}'
        case 'inserted' | 'inserted_before':
            return f'after_block@{stage}:{last}'
    return entry.placement


def _spread(depth: int, number: int) -> str:
    """The blocks after which `number` modules follow, evenly: 1, 3, 5 of 6; 6, 13, 20 of 23."""
    return ','.join(str(depth // number * (i + 1) - 1) for i in range(number))
