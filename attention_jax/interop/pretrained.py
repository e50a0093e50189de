"""Networks with weights: from PyTorch's files, the hub, runs of our own, and files of our own.

A file of our own is a safetensors file whose arrays have our paths ('params/head/kernel') and whose
metadata hold a card: model, arguments, source, licence, preprocessing, version.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax import checks
from attention_jax.interop import files, preprocessing, runs, torch
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.models.registry import ModelEntry, create_model, model_entry
from attention_jax.modules.registry import field_names, list_attention
from attention_jax.version import __version__

_CARD = 'attention_jax'  # the card's key in the metadata
_OURS = 'attention_jax'  # the name of the scheme of our own paths

# Fields of a network that may differ from those its weights were made with ...
_FREE = {
    'num_classes',
    'dtype',
    'param_dtype',
    'dropout_rate',
    'drop_path_rate',
    'zero_init_last',
    'initialization',
    'spatial_dims',
    'anchors',
    'masks',
    'image_size',
}
# ... and those that may where the weights are of a network without a mechanism.
_MECHANISM = {'attention': None, 'placement': None, 'attention_args': None, 'identity_init': False}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a file of our own says of itself.

    Attributes:
        model: registry name of the network or mechanism.
        arguments: what it was created with.
        source: where the weights are from.
        licence: of the weights.
        preprocessing: of the images, or None.
        version: of this package, when it was written.
    """

    model: str
    arguments: Mapping[str, Any]
    source: str
    licence: str
    preprocessing: Preprocessing | None
    version: str


@dataclasses.dataclass(frozen=True)
class _Weights:
    """A source, read as far as its description.

    Attributes:
        text: as the user gave it.
        path: of the file or work directory.
        timm: timm's config.json, empty without one.
        card: of a file of our own, or None.
    """

    text: str
    path: pathlib.Path
    timm: Mapping[str, Any]
    card: Card | None


def load_pretrained(
    name: str,
    source: str | os.PathLike[str],
    *,
    channels: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> tuple[nn.Module, dict[str, Any], torch.Report]:
    """Creates a network or mechanism with weights from a file, a run or the hub.

    What is asked for may differ from what the weights are of in three ways: another `num_classes`,
    another number of `channels`, and a mechanism (`attention`, with its arguments) where they have
    none. The rest is loaded, and the arrays that are new are initialised and reported.

    Args:
        name: registry name, e.g. 'resnet50'.
        source: a .safetensors file of PyTorch's names or of `save`; a .pth, .pt, .bin, .tar or
            .ckpt file, which needs PyTorch; a work directory of `training.train`; or a hub id such
            as 'timm/seresnet50.a1_in1k' (also 'hf_hub:ORGANISATION/NAME@REVISION'), which needs the
            extra `hub` and, the first time, a network.
        channels: number of channels of the images; None is the weights' own.
        seed: of the new arrays.
        **arguments: the network's own; those that are not given are the ones that a file of ours or
            a work directory was made with, and `num_classes` is the weights' own. The head of
            weights without one is new, and asked for with `num_classes`; so are the neck and the
            heads of a detector where the weights are its backbone's alone.

    Returns:
        The Linen module; its variables, every collection, as NumPy arrays of the file's types; and
        the report, whose `new` names what was initialised and whose `preprocessing` says how images
        are prepared: as the file says, else timm's config.json beside it or on the hub, else what
        is usual for the network. It is None for a mechanism.

    Raises:
        ValueError: an unknown name or argument; a source that does not exist, is damaged, is of
            another model or would run code; or arrays that are missing, left over or of another
            shape: they are listed.
    """
    if name in list_attention():
        return _load_attention(name, _open(source), channels, arguments)
    entry, weights = model_entry(name), _open(source)
    own, arrays = _read_weights(name, weights)
    if weights.path.is_dir():
        checks.arguments(f'the network of {source}', arguments, field_names(type(own)))
        module = own.clone(**arguments)
    else:
        made_with = weights.card.arguments if weights.card else {}
        module = create_model(name, **{**made_with, **arguments})
    found = _read_own(entry, module, arrays, weights, own, arguments)
    if 'num_classes' not in arguments:
        module = module.clone(num_classes=found.module.num_classes)
    example = torch.example(entry, module, channels or found.channels)
    variables, report = _transfer(module, found, example, seed)
    facts = _preprocessing(entry, weights)
    return module, variables, dataclasses.replace(report, preprocessing=facts)


def load_variables(
    name: str,
    module: nn.Module,
    source: str | os.PathLike[str],
    example: jax.ShapeDtypeStruct,
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], torch.Report]:
    """Loads weights for a network that exists, as `load_pretrained` does.

    Args:
        name: registry name that it was created by.
        module: the network.
        source: see `load_pretrained`.
        example: shape and type of its input.
        seed: of the new arrays.

    Returns:
        The variables and the report.

    Raises:
        ValueError: see `load_pretrained`.
    """
    entry, weights = model_entry(name), _open(source)
    own, arrays = _read_weights(name, weights)
    given = {field: getattr(module, field, None) for field in ('num_classes', 'attention')}
    found = _read_own(entry, module, arrays, weights, own, given)
    variables, report = _transfer(module, found, example, seed)
    return variables, dataclasses.replace(report, preprocessing=_preprocessing(entry, weights))


def read_preprocessing(name: str, source: str | os.PathLike[str]) -> Preprocessing:
    """Returns the preprocessing that belongs to weights, without reading their arrays.

    Arguments and errors are those of `load_pretrained`.
    """
    return _preprocessing(model_entry(name), _open(source))


def save(
    path: str | os.PathLike[str],
    module_name: str,
    variables: Mapping[str, Any],
    *,
    arguments: Mapping[str, Any] | None = None,
    source: str = '',
    licence: str = '',
    preprocessing: Preprocessing | None = None,
) -> None:
    """Writes weights and what they are of to one file, which `load_pretrained` reads.

    Args:
        path: ends in .safetensors; a file there is replaced, whole or not at all.
        module_name: registry name of the network or mechanism.
        variables: its variables, every collection; types are kept.
        arguments: what it was created with.
        source: where the weights are from, for a reader.
        licence: of the weights, for a reader.
        preprocessing: of the images.

    Raises:
        ValueError: an unknown name or argument, one that JSON cannot hold, or a path that cannot be
            written to.
    """
    arguments = dict(arguments or {})
    torch.build(module_name, arguments)
    card = {
        'model': module_name,
        'arguments': arguments,
        'source': source,
        'licence': licence,
        'preprocessing': preprocessing and preprocessing.as_dict(),
        'version': __version__,
    }
    arrays = traverse_util.flatten_dict(dict(variables), sep='/')
    files.write(path, arrays, {_CARD: json.dumps(card, default=_type_name)})


def read_card(path: str | os.PathLike[str]) -> Card | None:
    """Returns the card of a file of our own, None if the file is not ours.

    Raises:
        ValueError: the file is damaged.
    """
    path = pathlib.Path(path)
    text = files.read_metadata(path).get(_CARD)
    if text is None:
        return None
    try:
        card = json.loads(text)
        facts = card['preprocessing']
        return Card(
            model=card['model'],
            arguments={k: revive(v) for k, v in card['arguments'].items()},
            source=card['source'],
            licence=card['licence'],
            preprocessing=facts and preprocessing.from_dict(facts),
            version=card['version'],
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'source {path}: its card cannot be read: {error!r}') from None


def revive(value: Any) -> Any:
    """Turns JSON's lists into the tuples that arguments of modules are."""
    if isinstance(value, list):
        return tuple(map(revive, value))
    return {k: revive(v) for k, v in value.items()} if isinstance(value, dict) else value


def _type_name(value: Any) -> str:
    """The name of a NumPy or JAX type, the only arguments that JSON lacks."""
    try:
        return jnp.dtype(value).name
    except TypeError:
        raise ValueError(f'arguments: {value!r} cannot be written to a card') from None


def _open(source: str | os.PathLike[str]) -> _Weights:
    path, timm = files.locate(source)
    return _Weights(str(source), path, timm, None if path.is_dir() else read_card(path))


def _preprocessing(entry: ModelEntry, weights: _Weights) -> Preprocessing:
    if weights.path.is_dir():
        return runs.describe(weights.path)[1]
    if weights.card and weights.card.preprocessing:
        return weights.card.preprocessing
    return preprocessing.from_timm(weights.timm) if weights.timm else preprocessing.default(entry)


def _read_weights(name: str, weights: _Weights) -> tuple[nn.Module | None, dict[str, np.ndarray]]:
    """The network that the weights are of, None for PyTorch's, and the arrays by name.

    Raises:
        ValueError: they are of another model.
    """
    if weights.path.is_dir():
        model = runs.describe(weights.path)[0]
        own, arrays = runs.read(weights.path)
    else:
        arrays = files.read_arrays(weights.path)
        if weights.card is None:
            return None, torch.clean(arrays)
        own, model = None, weights.card.model
    if model != name:
        raise ValueError(f'source {weights.text} holds {model!r}, not {name!r}')
    if own is None:
        own = torch.build(name, weights.card.arguments)[1]
    return own, arrays


@dataclasses.dataclass(frozen=True)
class _Own:
    """A network as its weights have it, with the arrays by our path."""

    module: nn.Module
    arrays: dict[str, np.ndarray]
    report: torch.Report
    channels: int


def _read_own(
    entry: ModelEntry,
    module: nn.Module,
    arrays: Mapping[str, np.ndarray],
    weights: _Weights,
    own: nn.Module | None,
    given: Mapping[str, Any],
) -> _Own:
    """Reads all arrays into the network that they are of.

    Of a file of ours or a work directory it is known (`own`). Else it is the network asked for, but
    with the number of classes that the arrays have, or without the mechanism that is asked for.

    Args:
        entry: the registry's entry.
        module: the network asked for.
        arrays: name -> array.
        weights: where they are from.
        own: the network that they are of, if it is known.
        given: arguments that the caller gave.

    Raises:
        ValueError: arrays that are missing, left over, or of another shape; or a network that
            differs from `own` in more than it may.
    """
    if own is not None:
        _check_same(own, module, weights)
        read = functools.partial(_read_ours, arrays)
        found = [_Own(own, *torch.fit_channels(entry, own, read, axis=-2))]
    else:
        candidates = [module]
        if _may_lack_mechanism(entry, module, given):
            candidates.append(module.clone(**_MECHANISM))
        found = []
        for candidate in candidates:
            found.append(_Own(candidate, *torch.read_network(entry, candidate, arrays)))
            for classes in _other_classes(found[-1], arrays, headless='num_classes' in given):
                other = candidate.clone(num_classes=classes)
                found.append(_Own(other, *torch.read_network(entry, other, arrays)))
            if found[-1].report.faults == 0:
                break
    best = min(found, key=lambda own: own.report.faults)
    if best.report.faults:
        raise ValueError(f'source {weights.text} does not fit {entry.name!r}: {best.report}')
    return best


def _may_lack_mechanism(entry: ModelEntry, module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether weights without a mechanism are taken for a network that has one.

    One that is asked for beside the name is new; one that belongs to the name is expected, but for
    detectors, whose released weights are those without.
    """
    if entry.family == 'yolo':
        return module.attention is not None
    return given.get('attention') is not None and entry.build().attention is None


def _read_ours(
    arrays: Mapping[str, np.ndarray], leaves: torch.Shapes
) -> tuple[dict[str, np.ndarray], torch.Report]:
    both = [path for path in leaves if path in arrays]
    report = torch.Report(
        _OURS,
        missing=tuple(path for path in leaves if path not in arrays),
        unused=tuple(path for path in arrays if path not in leaves),
        mismatched={
            path: (arrays[path].shape, leaves[path].shape)
            for path in both
            if arrays[path].shape != leaves[path].shape
        },
    )
    return {path: arrays[path] for path in both}, report


def _other_classes(own: _Own, arrays: Mapping[str, np.ndarray], *, headless: bool) -> Sequence[int]:
    """Numbers of classes that would explain what did not fit; 0 is a network without a head."""
    asked, report = own.module.num_classes, own.report
    # A detector has several outputs a class.
    classes_of = getattr(own.module, 'classes_of', lambda outputs: outputs)
    numbers = {
        classes_of(theirs[0])
        for theirs, ours in report.mismatched.values()
        if len(theirs) == len(ours) == 1 and classes_of(ours[0]) == asked
    }
    if asked == 0:
        unused = (arrays[key].shape for key in report.unused)
        numbers |= {classes_of(shape[0]) for shape in unused if len(shape) == 1}
    elif headless and report.missing:
        numbers.add(0)
    return sorted(numbers - {None})


def _check_same(own: nn.Module, module: nn.Module, weights: _Weights) -> None:
    """Raises a ValueError if the network asked for computes another function than its weights'."""
    free = _FREE | (set(_MECHANISM) if getattr(own, 'attention', '') is None else set())
    for field in field_names(type(own)):
        theirs, ours = getattr(own, field), getattr(module, field)
        if field not in free and field != 'name' and theirs != ours:
            raise ValueError(
                f'source {weights.text} was made with {field} {theirs!r}, and {ours!r} was asked '
                'for'
            )


def _transfer(
    module: nn.Module, own: _Own, example: jax.ShapeDtypeStruct, seed: int
) -> tuple[dict[str, Any], torch.Report]:
    """The variables of `module`: what its weights have, and the rest initialised."""

    def init() -> dict[str, jax.Array]:
        variables = module.init(jax.random.key(seed), jnp.zeros(example.shape, example.dtype))
        return traverse_util.flatten_dict(variables, sep='/')

    leaves = jax.eval_shape(init)
    loaded = {
        path: own.arrays[path]
        for path, leaf in leaves.items()
        if path in own.arrays and own.arrays[path].shape == leaf.shape
    }
    new = tuple(path for path in leaves if path not in loaded)
    dropped = tuple(path for path in own.arrays if path not in leaves)
    if new:
        # Compiled for these alone: the forward pass and all other arrays fall away.
        made = jax.jit(lambda: {path: value for path, value in init().items() if path in new})()
        loaded |= jax.tree.map(np.asarray, made)
    variables = traverse_util.unflatten_dict({path: loaded[path] for path in leaves}, sep='/')
    return variables, dataclasses.replace(own.report, new=new, dropped=dropped)


def _load_attention(
    name: str, weights: _Weights, channels: int | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], torch.Report]:
    """A mechanism: nothing may differ from what the file has."""
    if channels is not None:
        raise ValueError(f'channels {channels} is for networks; attention {name!r} has its own')
    if weights.path.is_dir():
        raise ValueError(f'source {weights.text} is a directory, not a file of attention {name!r}')
    own, arrays = _read_weights(name, weights)
    if own is None:
        return torch.from_state_dict(name, arrays, **arguments)
    entry, module = torch.build(name, {**weights.card.arguments, **arguments})
    _check_same(own, module, weights)
    best, report = dict(arrays), torch.Report(_OURS)
    if entry.context_channels is None:  # else the shapes cannot be told from the arrays
        for leaves in torch.trial_shapes(entry, module, arrays):
            best, report = _read_ours(arrays, leaves)
            if report.faults == 0:
                break
    if report.faults:
        raise ValueError(f'source {weights.text} does not fit {name!r}: {report}')
    return module, traverse_util.unflatten_dict(best, sep='/'), report
