"""Networks and mechanisms with weights: from PyTorch's files, the hub, and files of our own."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax.interop import cards, files, matching, preprocessing, torch
from attention_jax.interop.matching import Arrays, Report
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.models.registry import ModelEntry, create_model, model_entry
from attention_jax.modules.registry import attention_entry, field_names, list_attention

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
class Weights:
    """A source of weights, read as far as its description.

    Attributes:
        source: as the user gave it.
        read: gives the arrays, by PyTorch's names or by our paths.
        model: registry name of what they are of; None where the source does not say.
        create: for arrays by our paths: builds the module that they are of, with other arguments
            where it is given some. None for PyTorch's names.
        preprocessing: of the images, as far as the source says it.
        licence: of the weights, likewise.
        origin: where they are from.
    """

    source: str
    read: Callable[[], Arrays]
    model: str | None = None
    create: Callable[[Mapping[str, Any]], nn.Module] | None = None
    preprocessing: Preprocessing | None = None
    licence: str = ''
    origin: str = ''

    def module_of(self, name: str) -> nn.Module | None:
        """The module that the arrays are of, where they have our paths.

        Raises:
            ValueError: they are not of the mechanism or network `name`.
        """
        if self.create is None:
            return None
        if self.model != name:
            raise ValueError(f'source {self.source} holds {self.model!r}, not {name!r}')
        return self.create({})


Source = str | os.PathLike[str] | Weights


def open_weights(source: Source) -> Weights:
    """Finds weights and reads their description.

    Args:
        source: a file or hub id, see `load_pretrained`; weights that are open stay as they are.

    Raises:
        ValueError: there is nothing of this name, or it is damaged.
    """
    if isinstance(source, Weights):
        return source
    path, timm = files.locate(source)
    card = cards.read_card(path)
    found = Weights(
        str(source),
        lambda: files.read_arrays(path),
        timm.get('architecture'),
        preprocessing=preprocessing.from_timm(timm) if timm else None,
        licence=timm.get('pretrained_cfg', timm).get('license', ''),
        origin=str(source),
    )
    if card is None:
        return dataclasses.replace(found, read=lambda: torch.clean(files.read_arrays(path)))
    return dataclasses.replace(
        found,
        model=card.model,
        create=lambda more: torch.build(card.model, {**card.arguments, **more})[1],
        preprocessing=card.preprocessing or found.preprocessing,
        licence=card.licence or found.licence,
        origin=card.source or found.origin,
    )


def load_pretrained(
    name: str, source: Source, *, channels: int | None = None, seed: int = 0, **arguments: Any
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Creates a network or mechanism with weights, as `attention_jax.load_pretrained` says.

    Here a source is a file, a hub id, or what `open_weights` and `training.pretrained` make of one.
    """
    if name in list_attention():
        return _load_attention(name, open_weights(source), channels, arguments)
    entry, weights = model_entry(name), open_weights(source)
    own = weights.module_of(name)
    module = weights.create(arguments) if own else create_model(name, **arguments)
    found = _read_own(entry, module, weights, own, arguments)
    if 'num_classes' not in arguments:
        module = module.clone(num_classes=found.module.num_classes)
    example = matching.network_input(entry, module, channels or found.channels)
    return module, *_transfer(module, found, example, seed, _images(entry, weights))


def load_variables(
    name: str, module: nn.Module, source: Source, example: jax.ShapeDtypeStruct, *, seed: int = 0
) -> tuple[dict[str, Any], Report]:
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
    entry, weights = model_entry(name), open_weights(source)
    own = weights.module_of(name)
    given = {field: getattr(module, field, None) for field in ('num_classes', 'attention')}
    found = _read_own(entry, module, weights, own, given)
    return _transfer(module, found, example, seed, _images(entry, weights))


def read_preprocessing(name: str, source: Source) -> Preprocessing:
    """Returns the preprocessing that belongs to weights, without reading their arrays.

    Arguments and errors are those of `load_pretrained`.
    """
    return _images(model_entry(name), open_weights(source))


def _images(entry: ModelEntry, weights: Weights) -> Preprocessing:
    return weights.preprocessing or preprocessing.default(entry)


@dataclasses.dataclass(frozen=True)
class _Own:
    """A network as its weights have it, with the arrays by our path."""

    module: nn.Module
    arrays: Arrays
    report: Report
    channels: int


def _read_own(
    entry: ModelEntry,
    module: nn.Module,
    weights: Weights,
    own: nn.Module | None,
    given: Mapping[str, Any],
) -> _Own:
    """Reads all arrays into the network that they are of.

    By our paths it is known (`own`). Else it is the network asked for, but with the number of
    classes that the arrays have, or without the mechanism that is asked for.

    Raises:
        ValueError: arrays that are missing, left over, or of another shape; or a network that
            differs from `own` in more than it may.
    """
    arrays = weights.read()

    def read(candidate: nn.Module) -> _Own:
        ways, axis = torch.readers(entry, candidate, arrays), torch.CHANNEL_AXIS
        return _Own(candidate, *matching.match_network(entry, candidate, ways, axis=axis))

    if own is not None:
        _check_same(own, module, weights)
        ways = [_by_our_paths(arrays)]
        found = [_Own(own, *matching.match_network(entry, own, ways, axis=-2))]
    else:
        candidates = [module]
        if _may_lack_mechanism(entry, module, given):
            candidates.append(module.clone(**_MECHANISM))
        found = []
        for candidate in candidates:
            found.append(read(candidate))
            headless = 'num_classes' in given
            for classes in _other_classes(entry, found[-1], arrays, headless=headless):
                found.append(read(candidate.clone(num_classes=classes)))
            if found[-1].report.faults == 0:
                break
    best = min(found, key=lambda own: own.report.faults)
    if best.report.faults:
        raise ValueError(f'source {weights.source} does not fit {entry.name!r}: {best.report}')
    return best


def _by_our_paths(arrays: Mapping[str, np.ndarray]) -> matching.Reader:
    return functools.partial(matching.match, arrays, lambda path, rank: ((path,), None), _OURS, ())


def _may_lack_mechanism(entry: ModelEntry, module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether weights without a mechanism are taken for a network that has one.

    One that is asked for beside the name is new; one that belongs to the name is expected, but for
    detectors, whose released weights are those without.
    """
    if entry.task == 'detection':
        return module.attention is not None
    return given.get('attention') is not None and entry.build().attention is None


def _other_classes(
    entry: ModelEntry, own: _Own, arrays: Mapping[str, np.ndarray], *, headless: bool
) -> Sequence[int]:
    """Numbers of classes that would explain what did not fit; 0 is a network without a head."""

    def classes_of(outputs: int) -> int | None:  # a detector has several outputs a class
        return own.module.classes_of(outputs) if entry.task == 'detection' else outputs

    asked, report = own.module.num_classes, own.report
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


def _check_same(own: nn.Module, module: nn.Module, weights: Weights) -> None:
    """Raises a ValueError if the network asked for computes another function than its weights'."""
    free = _FREE | (set(_MECHANISM) if getattr(own, 'attention', '') is None else set())
    for field in field_names(type(own)):
        theirs, ours = getattr(own, field), getattr(module, field)
        if field not in free and field != 'name' and theirs != ours:
            raise ValueError(
                f'source {weights.source} was made with {field} {theirs!r}, and {ours!r} was asked '
                'for'
            )


def _transfer(
    module: nn.Module,
    own: _Own,
    example: jax.ShapeDtypeStruct,
    seed: int,
    images: Preprocessing,
) -> tuple[dict[str, Any], Report]:
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
    facts = {'new': new, 'dropped': dropped, 'preprocessing': images}
    return variables, dataclasses.replace(own.report, **facts)


def _load_attention(
    name: str, weights: Weights, channels: int | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any], Report]:
    """A mechanism: nothing may differ from what the file has."""
    if channels is not None:
        raise ValueError(f'channels {channels} is for networks; attention {name!r} has its own')
    own, arrays = weights.module_of(name), weights.read()
    if own is None:
        return torch.from_state_dict(name, arrays, **arguments)
    entry, module = attention_entry(name), weights.create(arguments)
    _check_same(own, module, weights)
    report = Report(_OURS)
    if entry.context_channels is None:  # else the shapes cannot be told from the arrays
        ways = [_by_our_paths(arrays)]
        arrays, report = matching.match_attention(entry, module, ways, arrays)
    if report.faults:
        raise ValueError(f'source {weights.source} does not fit {name!r}: {report}')
    return module, traverse_util.unflatten_dict(arrays, sep='/'), report
