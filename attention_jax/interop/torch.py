"""Weights under PyTorch's names into our variables, and back. PyTorch itself is not needed.

A registry entry says for each naming scheme in the wild how its names map to ours
(`torch_names`); this file interprets those tables.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import EinopsError, rearrange
from flax import linen as nn
from flax import traverse_util

from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.models.registry import ModelEntry, create_model, model_entry
from attention_jax.modules.registry import (
    AttentionEntry,
    ForeignName,
    TorchName,
    attention_entry,
    create_attention,
    list_attention,
    names_for,
)

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # our path -> shape and type
# The foreign names of an array, with its einops pattern if the table gives one.
_Foreign = tuple[tuple[str, ...], str | None]

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
_WITHOUT_COUNTERPART = ('num_batches_tracked',)
# What DataParallel and detectors put before every name.
_PREFIXES = ('module.', 'backbone.')

# Sides that every pool, grid and group of frames in use divides.
_TRIAL_SIDE = 96
_TRIAL_FRAMES = 8
_LISTED = 10  # names of each kind that a report prints


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion found.

    Attributes:
        source: the naming scheme.
        missing: our arrays ('params/fc1/kernel') that the state dict lacks, under its names.
        unused: names of the state dict that have no place in the module.
        mismatched: name -> (its shape, our shape).
        ignored: names whose arrays the foreign module holds and never uses; no fault.
        new: our arrays that `load_pretrained` initialised, because what was asked for is not what
            the weights are of (classes, channels, an added mechanism); no fault.
        dropped: arrays of the weights, by our path, that have no place for the same reason.
        preprocessing: how images are prepared for these weights; `load_pretrained` fills it in.
    """

    source: str
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    ignored: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    @property
    def faults(self) -> int:
        """Number of arrays that did not fit."""
        return len(self.missing) + len(self.unused) + len(self.mismatched)

    def __str__(self) -> str:
        shapes = [
            f'shape of {name} is {theirs}, ours {ours}'
            for name, (theirs, ours) in self.mismatched.items()
        ]
        kinds = {
            'missing': self.missing,
            'unused': self.unused,
            'mismatched': shapes,
            'new': self.new,
            'dropped': self.dropped,
        }
        lines = [f'read as {self.source!r}']
        for kind, names in kinds.items():
            more = f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
            if names:
                lines.append(f'{len(names)} {kind}: {", ".join(names[:_LISTED])}{more}')
        return '; '.join(lines)


def from_state_dict(
    name: str,
    state_dict: Mapping[str, Any],
    *,
    source: str | None = None,
    strict: bool = True,
    **arguments: Any,
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Reads arrays under PyTorch's names into a mechanism or network.

    Args:
        name: registry name of a mechanism or network.
        state_dict: foreign name -> array (anything that NumPy reads); its types are kept.
        source: naming scheme, e.g. 'authors' or 'timm'; None recognises it by the names.
        strict: a missing, unused or mismatched array is a ValueError; else it is only reported.
        **arguments: the module's own arguments.

    Returns:
        The module, its variables with every collection as NumPy arrays, and the report. Without
        `strict`, what is missing or mismatched is absent from the variables.

    Raises:
        ValueError: unknown name or scheme, no table of names, or (strict) arrays that do not fit.
    """
    entry, module = build(name, arguments)
    variables, report = read(entry, module, clean(state_dict), source)
    if strict and report.faults:
        raise ValueError(f'the state dict does not fit {name!r}: {report}')
    return module, traverse_util.unflatten_dict(variables, sep='/'), report


def to_state_dict(
    name: str, variables: Mapping[str, Any], *, source: str | None = None, **arguments: Any
) -> dict[str, np.ndarray]:
    """Writes our variables under PyTorch's names and in its layouts.

    Args:
        name: registry name of a mechanism or network.
        variables: its variables, every collection.
        source: naming scheme, or what stands before its dot; None is the authors'.
        **arguments: the module's own arguments.

    Returns:
        Foreign name -> NumPy array, of the variables' types.

    Raises:
        ValueError: unknown name or scheme, or a variable that the scheme has no name for.
    """
    entry, module = build(name, arguments)
    scheme, names = next(iter(_schemes(entry, module, source).items()))
    find = _finder(names)
    result = {}
    for path, value in traverse_util.flatten_dict(dict(variables), sep='/').items():
        collection, _, ours = path.partition('/')
        found = find(ours)
        if found is None:
            raise ValueError(f'scheme {scheme!r} of {name!r} has no name for {collection}/{ours}')
        theirs, pattern = found
        value = np.asarray(value)
        pattern = pattern or _layout(ours, value.ndim)
        parts = _backward(value, pattern, len(theirs)) if pattern else [value]
        result.update(zip(theirs, parts, strict=True))
    return result


def build(name: str, arguments: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """The registry's entry of a mechanism or network, and the module."""
    if name in list_attention():
        return attention_entry(name), create_attention(name, **arguments)
    return model_entry(name), create_model(name, **arguments)


def _schemes(
    entry: Any, module: nn.Module, source: str | None
) -> Mapping[str, Mapping[str, TorchName]]:
    """The naming schemes to try: all of the entry's, the one asked for, or those that begin so."""
    schemes = names_for(entry, module)
    if not schemes:
        raise ValueError(f'{entry.name!r} has no table of PyTorch names')
    if source is None:
        return schemes
    if source in schemes:
        return {source: schemes[source]}
    chosen = {s: names for s, names in schemes.items() if s.startswith(f'{source}.')}
    if not chosen:
        raise ValueError(f'source {source!r} is unknown for {entry.name!r}: {", ".join(schemes)}')
    return chosen


def clean(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that count, without the prefixes that wrappers put before every name."""
    arrays = {
        key: np.asarray(value)
        for key, value in state_dict.items()
        if key.rpartition('.')[2] not in _WITHOUT_COUNTERPART
    }
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in arrays):
            arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


def read(
    entry: Any, module: nn.Module, arrays: Mapping[str, np.ndarray], source: str | None = None
) -> tuple[dict[str, np.ndarray], Report]:
    """Reads arrays under PyTorch's names, as the scheme and the number of channels that fit best.

    Args:
        entry: the registry's entry of the module.
        module: a mechanism or network.
        arrays: see `clean`.
        source: naming scheme; None tries each.

    Returns:
        Our path -> array, and the report.

    Raises:
        ValueError: no table of names, an unknown scheme, or a module that accepts no input.
    """
    if isinstance(entry, ModelEntry):
        return read_network(entry, module, arrays, source)[:2]
    best = None
    for attempt in _attempts(entry, module, arrays, source):
        for leaves in trial_shapes(entry, module, arrays):
            found = attempt(leaves)
            if best is None or found[1].faults < best[1].faults:
                best = found
            if best[1].faults == 0:
                return best
    if best is None:
        raise ValueError(f'{entry.name!r} accepts no input with these arguments: {module}')
    return best


def read_network(
    entry: ModelEntry,
    module: nn.Module,
    arrays: Mapping[str, np.ndarray],
    source: str | None = None,
) -> tuple[dict[str, np.ndarray], Report, int]:
    """Reads a network's arrays as `read` does, and returns its number of input channels too."""
    attempts = _attempts(entry, module, arrays, source)

    def best(leaves: Shapes) -> tuple[dict[str, np.ndarray], Report]:
        return min((attempt(leaves) for attempt in attempts), key=lambda found: found[1].faults)

    return fit_channels(entry, module, best, axis=1)


def network_shapes(
    entry: ModelEntry, module: nn.Module, channels: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Our path -> shape and type of every variable of a network that reads `channels`."""
    variables = jax.eval_shape(module.init, jax.random.key(0), example(entry, module, channels))
    return traverse_util.flatten_dict(variables, sep='/')


def example(entry: ModelEntry, module: nn.Module, channels: int) -> jax.ShapeDtypeStruct:
    """What the network is called with: one image, or one video where it has a time axis."""
    frames = (_TRIAL_FRAMES,) if getattr(module, 'spatial_dims', 2) == 3 else ()
    return jax.ShapeDtypeStruct((1, *frames, *entry.input_size, channels), np.float32)


def fit_channels(
    entry: ModelEntry,
    module: nn.Module,
    read: Callable[[Shapes], tuple[dict[str, np.ndarray], Report]],
    *,
    axis: int,
) -> tuple[dict[str, np.ndarray], Report, int]:
    """Reads a network's arrays for three input channels, then for those of its first kernel.

    Args:
        entry: the registry's entry.
        module: the network.
        read: a function of our path -> shape that gives the arrays and the report.
        axis: of the input channels in a kernel as `read` reports it.

    Returns:
        Our path -> array, the report, and the number of input channels.
    """
    channels = 3
    variables, report = read(network_shapes(entry, module, channels))
    others = {
        theirs[axis]
        for theirs, ours in report.mismatched.values()
        if len(theirs) == len(ours) > 3 and ours[-2] == channels and theirs[axis] != channels
    }
    for other in others:
        found = read(network_shapes(entry, module, other))
        if found[1].faults < report.faults:
            (variables, report), channels = found, other
    return variables, report, channels


def trial_shapes(
    entry: AttentionEntry, module: nn.Module, arrays: Mapping[str, np.ndarray]
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """A mechanism's shapes for every number of input channels that the state dict makes plausible.

    A state dict does not say how many channels its module reads. Abstract initialisation is cheap,
    so each length that occurs in it is tried, then what kernels of grouped convolutions may see in
    all, then the powers of two (for modules whose arrays do not depend on the channels).
    """
    lengths = {length for a in arrays.values() for length in a.shape}
    grouped = {
        a.shape[1] * groups
        for a in arrays.values()
        if a.ndim > 2 and math.prod(a.shape[2:]) > 1
        for groups in range(1, a.shape[0] + 1)
        if a.shape[0] % groups == 0
    }
    candidates = sorted(lengths, reverse=True) + sorted(grouped) + [2**i for i in range(12)]
    spatial_dims = getattr(module, 'spatial_dims', 2)

    def trial(channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *[_TRIAL_SIDE] * spatial_dims, channels), np.float32)

    context = entry.context_channels
    further = jax.tree.map(trial, context(arrays)) if context else ()
    for channels in candidates:
        try:
            variables = jax.eval_shape(module.init, jax.random.key(0), trial(channels), *further)
        except ValueError:
            continue
        yield traverse_util.flatten_dict(variables, sep='/')


def _attempts(
    entry: Any, module: nn.Module, arrays: Mapping[str, np.ndarray], source: str | None
) -> list[Callable[[Shapes], tuple[dict[str, np.ndarray], Report]]]:
    """For each naming scheme the function of our shapes that reads the arrays by it."""
    return [
        functools.partial(_read, arrays, names, _finder(names), scheme)
        for scheme, names in _schemes(entry, module, source).items()
    ]


def _read(
    arrays: Mapping[str, np.ndarray],
    names: Mapping[str, TorchName],
    find: Callable[[str], _Foreign | None],
    scheme: str,
    leaves: Shapes,
) -> tuple[dict[str, np.ndarray], Report]:
    variables, missing, mismatched, used = {}, [], {}, set()
    for path, leaf in leaves.items():
        ours = path.partition('/')[2]
        found = find(ours)
        theirs, pattern = found or ((path,), None)
        absent = [name for name in theirs if found is None or name not in arrays]
        used.update(theirs)
        if absent:
            missing += absent
            continue
        pattern = pattern or _layout(ours, len(leaf.shape))
        parts = [arrays[name] for name in theirs]
        value = _forward(parts, pattern, leaf.shape) if pattern else parts[0]
        if value is None or value.shape != leaf.shape:
            mismatched |= {name: (arrays[name].shape, leaf.shape) for name in theirs}
        else:
            variables[path] = value
    ignored = tuple(key for key in arrays if key not in used and names.get(key, '') is None)
    unused = tuple(key for key in arrays if key not in used and key not in ignored)
    return variables, Report(scheme, tuple(missing), unused, mismatched, ignored)


def _finder(
    names: Mapping[ForeignName, TorchName],
) -> Callable[[str], _Foreign | None]:
    """A function from our path to the foreign names of the array there, or None.

    One name, or several of arrays that are stacked. A network's table has a line for each layer,
    so the lines are looked up by what of our path they spell out; the first that fits counts.
    """
    lines: dict[str, list[tuple[int, Callable[[str], _Foreign | None]]]] = {}
    inner: dict[int, Callable[[str], _Foreign | None]] = {}  # one submodule's table, many places
    for number, (key, value) in enumerate(names.items()):
        if value is None:
            continue
        ours, extra = (value, None) if isinstance(value, str) else value
        if isinstance(extra, Mapping) and id(extra) not in inner:
            inner[id(extra)] = _finder(extra)
        special = re.search(r'[{*]', ours)
        literal = ours[: special.start()].rpartition('/')[0] if special else ours
        line = _line(key, ours, extra, inner.get(id(extra)))
        lines.setdefault(literal, []).append((number, line))

    def find(path: str) -> _Foreign | None:
        ends = [0, *(m.start() for m in re.finditer('/', path)), len(path)]
        near = [line for end in ends for line in lines.get(path[:end], ())]
        for _, line in sorted(near, key=lambda numbered: numbered[0]):
            found = line(path)
            if found is not None:
                return found
        return None

    return find


def _line(
    key: ForeignName,
    ours: str,
    extra: Any,
    inner: Callable[[str], _Foreign | None] | None,
) -> Callable[[str], _Foreign | None]:
    """One line of a table as a function of our path."""
    expression = re.compile(_regular_expression(ours))
    theirs = (key,) if isinstance(key, str) else key

    def find(path: str) -> _Foreign | None:
        match = expression.fullmatch(path)
        if match is None:
            return None
        fields = match.groupdict()
        rest, leaf = fields.pop('rest', None), fields.pop('leaf', None)
        if rest is not None:
            found = inner(rest)
            if found is None:
                return None
            prefix = key.format(**fields).removesuffix('**')
            return tuple(prefix + name for name in found[0]), found[1]
        names, pattern = tuple(name.format(**fields) for name in theirs), extra
        if leaf is not None:
            names = tuple(name.removesuffix('*') + _LEAVES[leaf] for name in names)
            if leaf in ('mean', 'var') or (leaf in ('bias', 'scale') and _is_kernel(extra)):
                pattern = None
        return names, pattern

    return find


def _regular_expression(ours: str) -> str:
    """'block{b}/norm/*' as a regular expression with groups b and leaf (`**`: rest)."""
    expression = re.escape(ours)
    expression = re.sub(r'\\\{(\w+)\\\}', r'(?P<\1>\\d+)', expression)
    expression = expression.replace(r'\*\*', '(?P<rest>.+)')
    return expression.replace(r'\*', f'(?P<leaf>{"|".join(_LEAVES)})')


def _is_kernel(pattern: str | None) -> bool:
    """Whether a layer's pattern speaks of its kernel, so not of its vectors."""
    return pattern is not None and len(pattern.split('->')[1].split()) > 1


def _layout(path: str, rank: int) -> str | None:
    return _KERNELS[rank] if path.rpartition('/')[2] == 'kernel' and rank in _KERNELS else None


def _forward(parts: list[np.ndarray], pattern: str, shape: tuple[int, ...]) -> np.ndarray | None:
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


def _backward(value: np.ndarray, pattern: str, count: int) -> list[np.ndarray]:
    """Our array in their layout: one array, or `count` of them along the first axis."""
    left, right = pattern.split('->')
    if count == 1:
        return [rearrange(value, f'{right} -> {left}')]
    return list(rearrange(value, f'{right} -> {left}', **{left.split()[0]: count}))
