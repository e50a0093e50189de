"""Arrays by name, beside the arrays that a module has; and how many channels the module reads.

Weights do not say how many channels their module reads. Abstract initialisation is cheap, so what
the arrays make plausible is tried.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax.interop import torch_names
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.models.registry import ModelEntry
from attention_jax.modules.registry import AttentionEntry, spatial_rank

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # our path -> shape and type
Arrays = dict[str, np.ndarray]

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


Reader = Callable[[Shapes], tuple[Arrays, Report]]


def match(
    arrays: Mapping[str, np.ndarray],
    find: Callable[[str, int], torch_names.Foreign | None],
    source: str,
    unneeded: Collection[str],
    leaves: Shapes,
) -> tuple[Arrays, Report]:
    """Looks for each array of a module among given ones.

    Args:
        arrays: name -> array.
        find: function of our path and rank that gives the names there, see `torch_names.finder`.
        source: the naming scheme, for the report.
        unneeded: names of arrays that the foreign module holds and never uses.
        leaves: what the module has.

    Returns:
        Our path -> array, of those that fit, and the report.
    """
    variables, missing, mismatched, used = {}, [], {}, set()
    for path, leaf in leaves.items():
        found = find(path, len(leaf.shape))
        if found is None:
            missing.append(path)
            continue
        theirs, pattern = found
        used.update(theirs)
        absent = [name for name in theirs if name not in arrays]
        if absent:
            missing += absent
            continue
        parts = [arrays[name] for name in theirs]
        value = torch_names.to_ours(parts, pattern, leaf.shape) if pattern else parts[0]
        if value is None or value.shape != leaf.shape:
            mismatched |= {name: (arrays[name].shape, leaf.shape) for name in theirs}
        else:
            variables[path] = value
    left = [key for key in arrays if key not in used]
    unused = tuple(key for key in left if key not in unneeded)
    ignored = tuple(key for key in left if key in unneeded)
    return variables, Report(source, tuple(missing), unused, mismatched, ignored)


def match_network(
    entry: ModelEntry, module: nn.Module, readers: Sequence[Reader], *, axis: int
) -> tuple[Arrays, Report, int]:
    """Reads a network's arrays for three input channels, then for those of its first kernel.

    Args:
        entry: the registry's entry.
        module: the network.
        readers: ways to read the arrays, of which the best counts.
        axis: of the input channels in a kernel as the report shows it.

    Returns:
        Our path -> array, the report, and the number of input channels.
    """

    def best(channels: int) -> tuple[Arrays, Report, int]:
        leaves = network_shapes(entry, module, channels)
        return *min((read(leaves) for read in readers), key=lambda found: found[1].faults), channels

    found = best(3)
    others = {
        theirs[axis]
        for theirs, ours in found[1].mismatched.values()
        if len(theirs) == len(ours) > 3 and ours[-2] == 3 and theirs[axis] != 3
    }
    return min([found, *map(best, others)], key=lambda found: found[1].faults)


def match_attention(
    entry: AttentionEntry,
    module: nn.Module,
    readers: Sequence[Reader],
    arrays: Mapping[str, np.ndarray],
) -> tuple[Arrays, Report]:
    """Reads a mechanism's arrays the way, and for the number of channels, that fit best.

    Raises:
        ValueError: the module accepts no input.
    """
    best = None
    for read in readers:
        for leaves in _attention_shapes(entry, module, arrays):
            found = read(leaves)
            if best is None or found[1].faults < best[1].faults:
                best = found
            if best[1].faults == 0:
                return best
    if best is None:
        raise ValueError(f'{entry.name!r} accepts no input with these arguments: {module}')
    return best


def network_shapes(entry: ModelEntry, module: nn.Module, channels: int) -> Shapes:
    """Our path -> shape and type of every variable of a network that reads `channels`."""
    return _shapes(module, network_input(entry, module, channels))


def network_input(entry: ModelEntry, module: nn.Module, channels: int) -> jax.ShapeDtypeStruct:
    """What the network is called with: one image, or one video where it has a time axis."""
    frames = (_TRIAL_FRAMES,) * (spatial_rank(module) - 2)
    return jax.ShapeDtypeStruct((1, *frames, *entry.input_size, channels), np.float32)


def _attention_shapes(
    entry: AttentionEntry, module: nn.Module, arrays: Mapping[str, np.ndarray]
) -> Iterator[Shapes]:
    """A mechanism's shapes for every number of input channels that its arrays make plausible.

    Each length that occurs in them is tried, then what kernels of grouped convolutions may see in
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
    sides = [_TRIAL_SIDE] * spatial_rank(module)

    def trial(channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *sides, channels), np.float32)

    context = entry.context_channels
    further = jax.tree.map(trial, context(arrays)) if context else ()
    for channels in sorted(lengths, reverse=True) + sorted(grouped) + [2**i for i in range(12)]:
        try:
            yield _shapes(module, trial(channels), *further)
        except ValueError:
            continue


def _shapes(module: nn.Module, *inputs: Any) -> Shapes:
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return traverse_util.flatten_dict(variables, sep='/')
