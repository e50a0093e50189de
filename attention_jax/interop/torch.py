"""Weights under PyTorch's names into our variables, and back. PyTorch itself is not needed.

A registry entry says for each naming scheme in the wild how its names map to ours
(`torch_names`); this file interprets those tables.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import EinopsError, rearrange
from flax import linen as nn
from flax import traverse_util

from attention_jax import registry

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

# Sides that every pool, grid and group of frames in use divides.
_TRIAL_SIDE = 96


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion found.

    Attributes:
        source: the naming scheme.
        missing: our arrays ('params/fc1/kernel') that the state dict lacks, under its names.
        unused: names of the state dict that have no place in the module.
        mismatched: name -> (its shape, our shape).
        ignored: names whose arrays the foreign module holds and never uses; no fault.
    """

    source: str
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    ignored: tuple[str, ...] = ()

    @property
    def faults(self) -> int:
        """Number of arrays that did not fit."""
        return len(self.missing) + len(self.unused) + len(self.mismatched)

    def __str__(self) -> str:
        lines = [f'read as {self.source!r}']
        lines += [f'missing: {name}' for name in self.missing]
        lines += [f'unused: {name}' for name in self.unused]
        lines += [
            f'shape of {n}: {theirs}, ours is {o}' for n, (theirs, o) in self.mismatched.items()
        ]
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
    entry, module = _build(name, arguments)
    arrays = {
        _strip_prefix(key, state_dict): np.asarray(value)
        for key, value in state_dict.items()
        if key.rpartition('.')[2] not in _WITHOUT_COUNTERPART
    }
    best = None
    for scheme, names in _schemes(entry, module, source).items():
        for leaves in _trial_leaves(entry, module, arrays):
            variables, report = _read(arrays, names, leaves, scheme)
            if best is None or report.faults < best[1].faults:
                best = variables, report
            if report.faults == 0:
                break
        if best is not None and best[1].faults == 0:
            break
    if best is None:
        raise ValueError(f'{name!r} with these arguments accepts no input: check {arguments}')
    variables, report = best
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
        source: naming scheme; None is the authors'.
        **arguments: the module's own arguments.

    Returns:
        Foreign name -> NumPy array, of the variables' types.

    Raises:
        ValueError: unknown name or scheme, or a variable that the scheme has no name for.
    """
    entry, module = _build(name, arguments)
    scheme, names = next(iter(_schemes(entry, module, source).items()))
    result = {}
    for path, value in traverse_util.flatten_dict(dict(variables), sep='/').items():
        collection, _, ours = path.partition('/')
        found = _foreign(ours, names)
        if found is None:
            raise ValueError(f'scheme {scheme!r} of {name!r} has no name for {collection}/{ours}')
        theirs, pattern = found
        value = np.asarray(value)
        pattern = pattern or _layout(ours, value.ndim)
        parts = _backward(value, pattern, len(theirs)) if pattern else [value]
        result.update(zip(theirs, parts, strict=True))
    return result


def _build(name: str, arguments: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    if name in registry.list_attention():
        return registry.attention_entry(name), registry.create_attention(name, **arguments)
    return registry.model_entry(name), registry.create_model(name, **arguments)


def _schemes(
    entry: Any, module: nn.Module, source: str | None
) -> Mapping[str, Mapping[str, registry.TorchName]]:
    """The naming schemes to try: all of the entry's, or the one asked for."""
    schemes = entry.torch_names(module) if callable(entry.torch_names) else entry.torch_names
    if not schemes:
        raise ValueError(f'{entry.name!r} has no table of PyTorch names')
    if source is None:
        return schemes
    if source not in schemes:
        raise ValueError(f'source {source!r} is unknown for {entry.name!r}: {", ".join(schemes)}')
    return {source: schemes[source]}


def _strip_prefix(key: str, state_dict: Mapping[str, Any]) -> str:
    """Drops the prefix that PyTorch's DataParallel puts before every name."""
    prefix = 'module.'
    return key.removeprefix(prefix) if all(k.startswith(prefix) for k in state_dict) else key


def _trial_leaves(
    entry: Any, module: nn.Module, arrays: Mapping[str, np.ndarray]
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Our arrays' shapes for every number of input channels that the state dict makes plausible.

    A state dict does not say how many channels its module reads. Abstract initialisation is cheap,
    so each length that occurs in it is tried, then what kernels of grouped convolutions may see in
    all, then the powers of two (for modules whose arrays do not depend on the channels).
    """
    if isinstance(entry, registry.ModelEntry):
        candidates = [a.shape[1] for a in arrays.values() if a.ndim == 4][:1] or [3]
        spatial_dims = 2
    else:
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

    context = getattr(entry, 'context_channels', None)
    further = jax.tree.map(trial, context(arrays)) if context else ()
    for channels in candidates:
        try:
            variables = jax.eval_shape(module.init, jax.random.key(0), trial(channels), *further)
        except ValueError:
            continue
        yield traverse_util.flatten_dict(variables, sep='/')


def _read(
    arrays: Mapping[str, np.ndarray],
    names: Mapping[str, registry.TorchName],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    scheme: str,
) -> tuple[dict[str, np.ndarray], Report]:
    variables, missing, mismatched, used = {}, [], {}, set()
    for path, leaf in leaves.items():
        ours = path.partition('/')[2]
        found = _foreign(ours, names)
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


def _foreign(
    path: str, names: Mapping[registry.ForeignName, registry.TorchName]
) -> tuple[tuple[str, ...], str | None] | None:
    """The foreign names of our array at `path`, with its einops pattern if the table gives one.

    One name, or several of arrays that are stacked.
    """
    for key, value in names.items():
        if value is None:
            continue
        ours, extra = (value, None) if isinstance(value, str) else value
        match = re.fullmatch(_regular_expression(ours), path)
        if match is None:
            continue
        theirs = (key,) if isinstance(key, str) else key
        fields = match.groupdict()
        rest, leaf = fields.pop('rest', None), fields.pop('leaf', None)
        if rest is not None:
            inner = _foreign(rest, extra)
            if inner is None:
                continue
            prefix = key.format(**fields).removesuffix('**')
            return tuple(prefix + name for name in inner[0]), inner[1]
        found = tuple(name.format(**fields) for name in theirs)
        if leaf is not None:
            found = tuple(name.removesuffix('*') + _LEAVES[leaf] for name in found)
            if leaf in ('mean', 'var') or (leaf in ('bias', 'scale') and _is_kernel(extra)):
                extra = None
        return found, extra
    return None


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
