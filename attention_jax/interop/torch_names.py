"""Where a PyTorch name becomes ours: the registry's tables `torch_names`, and layouts of arrays.

How a table is written says `modules.registry`. It is read from our side: the path of an array of
ours gives the names that PyTorch has for it, and the einops pattern that makes ours of theirs.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from einops import EinopsError, rearrange

from attention_jax.modules.registry import ForeignName, TorchName

# The foreign names of an array (several: they are stacked) and its pattern, None for as it is.
Foreign = tuple[tuple[str, ...], str | None]
_Find = Callable[[str], Foreign | None]

# Our leaf -> PyTorch's, for a whole layer ('fc1.*').
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
# A kernel's layout in PyTorch, by the rank of ours.
_KERNELS = {
    2: 'o i -> i o',
    3: 'o i k -> k i o',
    4: 'o i h w -> h w i o',
    5: 'o i t h w -> t h w i o',
}


def finder(names: Mapping[ForeignName, TorchName]) -> Callable[[str, int], Foreign | None]:
    """A function of an array's path ('params/norm/scale') and rank: its foreign names, or None."""
    lookup = _lookup(names)

    def find(path: str, rank: int) -> Foreign | None:
        found = lookup(path.partition('/')[2])  # the collection has no part in it
        if found and not found[1] and path.rpartition('/')[2] == 'kernel':
            return found[0], _KERNELS.get(rank)
        return found

    return find


def _lookup(names: Mapping[ForeignName, TorchName]) -> _Find:
    """The first line of a table that fits a path.

    A network's table has a line for each layer, so lines are found by what they spell of our path.
    """
    lines: dict[str, list[tuple[int, _Find]]] = {}
    inner: dict[int, _Find] = {}  # one submodule's table, in many places
    for number, (key, value) in enumerate(names.items()):
        if value is None:
            continue
        ours, extra = (value, None) if isinstance(value, str) else value
        if isinstance(extra, Mapping) and id(extra) not in inner:
            inner[id(extra)] = _lookup(extra)
        special = re.search(r'[{*]', ours)
        literal = ours[: special.start()].rpartition('/')[0] if special else ours
        line = _line(key, ours, extra, inner.get(id(extra)))
        lines.setdefault(literal, []).append((number, line))

    def find(path: str) -> Foreign | None:
        ends = [0, *(m.start() for m in re.finditer('/', path)), len(path)]
        near = [line for end in ends for line in lines.get(path[:end], ())]
        near.sort(key=lambda numbered: numbered[0])
        return next(filter(None, (line(path) for _, line in near)), None)

    return find


def _line(key: ForeignName, ours: str, extra: Any, inner: _Find | None) -> _Find:
    """One line of a table as a function of our path."""
    # 'block{b}/norm/*' as a regular expression with groups b and leaf (`**`: rest).
    expression = re.sub(r'\\\{(\w+)\\\}', r'(?P<\1>\\d+)', re.escape(ours))
    expression = expression.replace(r'\*\*', '(?P<rest>.+)')
    expression = re.compile(expression.replace(r'\*', f'(?P<leaf>{"|".join(_LEAVES)})'))
    theirs = (key,) if isinstance(key, str) else key
    of_kernel = isinstance(extra, str) and len(extra.split('->')[1].split()) > 1

    def find(path: str) -> Foreign | None:
        match = expression.fullmatch(path)
        if match is None:
            return None
        fields = match.groupdict()
        if 'rest' in fields:
            prefix, found = key.format(**fields).removesuffix('**'), inner(fields['rest'])
            return found and (tuple(prefix + name for name in found[0]), found[1])
        names, leaf = tuple(name.format(**fields) for name in theirs), fields.get('leaf')
        if leaf is None:
            return names, extra
        # A pattern of several axes is the kernel's, one of a single axis that of bias and scale.
        plain = leaf in ('mean', 'var') or (leaf in ('bias', 'scale') and of_kernel)
        names = tuple(name.removesuffix('*') + _LEAVES[leaf] for name in names)
        return names, None if plain else extra

    return find


def to_ours(parts: list[np.ndarray], pattern: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Their array, or their arrays stacked, in our layout of `shape`; None where it cannot be.

    Trailing axes of length 1 may differ: a linear layer and a 1x1 convolution are the same.
    """
    if len({part.shape for part in parts}) > 1:
        return None
    value = np.stack(parts) if len(parts) > 1 else parts[0]
    left, right = pattern.split('->')
    axes = re.sub(r'\([^)]*\)', 'x', left).split()
    core = value.shape[: len(axes)]
    missing_axes = len(axes) - value.ndim
    if math.prod(core) != value.size or any(axis != '1' for axis in axes[value.ndim :]):
        return None
    value = value.reshape(core + (1,) * max(missing_axes, 0))
    if any(axis == '1' and n != 1 for axis, n in zip(axes, value.shape, strict=True)):
        return None
    # What they fold into one axis, our shape tells apart.
    folded = ' '.join(re.findall(r'\(([^)]*)\)', left)).split()
    ours = zip(re.findall(r'\([^)]*\)|\S+', right), shape, strict=False)
    try:
        return rearrange(value, pattern, **{axis: n for axis, n in ours if axis in folded})
    except EinopsError:
        return None


def to_theirs(value: np.ndarray, pattern: str, count: int) -> list[np.ndarray]:
    """Our array in their layout: one array, or `count` of them along the first axis."""
    left, right = pattern.split('->')
    sizes = {left.split()[0]: count} if count > 1 else {}
    value = rearrange(value, f'{right} -> {left}', **sizes)
    return list(value) if count > 1 else [value]
