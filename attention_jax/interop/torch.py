"""Weights under PyTorch's names into our variables, and back. PyTorch itself is not needed.

Where a name becomes ours says `torch_names`, which reads the tables of the registry's entries.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax.interop import torch_names
from attention_jax.interop.matching import Reader, Report, match, match_attention, match_network
from attention_jax.models.registry import ModelEntry, create_model, model_entry
from attention_jax.modules.registry import (
    ForeignName,
    TorchName,
    TorchNames,
    attention_entry,
    create_attention,
    list_attention,
    names_for,
)

CHANNEL_AXIS = 1  # of the input channels in a kernel of PyTorch's
_WITHOUT_COUNTERPART = ('num_batches_tracked',)
# What DataParallel and detectors put before every name.
_PREFIXES = ('module.', 'backbone.')


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
    arrays = clean(state_dict)
    ways = readers(entry, module, arrays, source)
    if isinstance(entry, ModelEntry):
        variables, report, _ = match_network(entry, module, ways, axis=CHANNEL_AXIS)
    else:
        variables, report = match_attention(entry, module, ways, arrays)
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
    find = torch_names.finder(names)
    result = {}
    for path, value in traverse_util.flatten_dict(dict(variables), sep='/').items():
        value = np.asarray(value)
        found = find(path, value.ndim)
        if found is None:
            raise ValueError(f'scheme {scheme!r} of {name!r} has no name for {path}')
        theirs, pattern = found
        parts = torch_names.to_theirs(value, pattern, len(theirs)) if pattern else [value]
        result.update(zip(theirs, parts, strict=True))
    return result


def build(name: str, arguments: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """The registry's entry of a mechanism or network, and the module."""
    if name in list_attention():
        return attention_entry(name), create_attention(name, **arguments)
    return model_entry(name), create_model(name, **arguments)


def _schemes(entry: Any, module: nn.Module, source: str | None) -> TorchNames:
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


def readers(
    entry: Any, module: nn.Module, arrays: Mapping[str, np.ndarray], source: str | None = None
) -> list[Reader]:
    """The ways to read arrays under PyTorch's names (see `clean`): one for each naming scheme.

    Args:
        entry: the registry's entry of the module.
        module: a mechanism or network.
        arrays: foreign name -> array.
        source: naming scheme; None is each.

    Raises:
        ValueError: no table of names, or an unknown scheme.
    """
    return [
        functools.partial(match, arrays, torch_names.finder(names), scheme, _unneeded(names))
        for scheme, names in _schemes(entry, module, source).items()
    ]


def _unneeded(names: Mapping[ForeignName, TorchName]) -> set[ForeignName]:
    return {theirs for theirs, ours in names.items() if ours is None}
