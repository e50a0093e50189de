"""Names to mechanisms and networks.

A mechanism registers itself beside its class, with what a reader, a test or a weight converter
needs to know about it::

    @register_attention('se', paper='...', arxiv='1709.01507', year=2018, family='channel')
    class SqueezeExcite(nn.Module): ...

A network registers as a function of its arguments. Registration happens on import of
`attention_jax.modules` and `attention_jax.models`.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

# How a foreign array maps to ours: a path, or a path with the einops pattern that turns their array
# into ours (for what is not a kernel of the usual layout), or all the names of a submodule.
# 'fc1.*' -> 'fc1/*' is a whole layer (weight, bias, running_mean, running_var), '{i}' is a number,
# and 'se.**' -> ('attention/**', names) is a submodule with names of its own. None is an array that
# the foreign module holds and never uses. A tuple of foreign names is one array of ours: theirs are
# stacked along a new first axis, which the pattern then speaks of.
ForeignName = str | tuple[str, ...]
TorchName = str | None | tuple[str, 'str | Mapping[str, TorchName]']
TorchNames = Mapping[str, Mapping[ForeignName, TorchName]]  # naming scheme -> foreign name -> ours


@dataclasses.dataclass(frozen=True)
class AttentionEntry:
    """What is known of a mechanism without building it.

    Attributes:
        name: registry name.
        cls: Linen module class.
        paper: title of the paper.
        arxiv: arXiv identifier, '' where there is none.
        year: year of publication.
        family: 'channel', 'spatial', 'mixed', 'positions' or 'block'.
        complexity: growth of its work, in N positions, C channels and the letters that
            `analysis.mechanism_table` explains, such as 'N C + C^2/r'.
        preserves_shape: the output has the input's shape.
        identity_at_init: the module returns its input when freshly initialised; a function of the
            module where that depends on its arguments.
        has_map: it sows an attention map.
        fixed_size: its parameters depend on the map's height and width.
        replaces_convolution: it stands in the place of a 3x3 convolution.
        placement: where a backbone puts it when it is not told: `models.placement.default`.
        variants: published forms: name -> arguments.
        torch_names: naming scheme -> foreign name -> our path, or a function of the module that
            gives it where names depend on arguments. The first scheme is the authors'.
        context_channels: for a mechanism that takes further maps after x, a function of a state
            dict's arrays that gives their channels: a tuple with a number for each map, and a tuple
            of numbers where one argument is a sequence of maps.
    """

    name: str
    cls: type[nn.Module]
    paper: str
    year: int
    family: str
    arxiv: str = ''
    complexity: str = ''
    preserves_shape: bool = True
    identity_at_init: bool | Callable[[Any], bool] = False
    has_map: bool = True
    fixed_size: bool = False
    replaces_convolution: bool = False
    placement: str = 'branch'
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    torch_names: TorchNames | Callable[[Any], TorchNames] = dataclasses.field(default_factory=dict)
    context_channels: Callable[[Mapping[str, Any]], tuple[Any, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """What is known of a network without building it.

    Attributes:
        name: registry name.
        build: function of keyword arguments that returns the Linen module.
        family: e.g. 'resnet'.
        paper: title of the paper, or what the name stands for.
        input_size: height and width it is counted at.
        num_classes: number of classes it is counted with.
        torch_names: naming scheme -> foreign name -> our path, or a function of the module.
    """

    name: str
    build: Callable[..., nn.Module]
    family: str
    paper: str = ''
    input_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    torch_names: TorchNames | Callable[[Any], TorchNames] = dataclasses.field(default_factory=dict)


_attention: dict[str, AttentionEntry] = {}
_models: dict[str, ModelEntry] = {}


def register_attention(name: str, **facts: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a mechanism's class under `name`; `facts` are the fields of `AttentionEntry`."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _attention:
            raise ValueError(f'name {name!r} is registered already, by {_attention[name].cls}')
        _attention[name] = AttentionEntry(name=name, cls=cls, **facts)
        return cls

    return register


def register_model(name: str, build: Callable[..., nn.Module], **facts: Any) -> None:
    """Registers a network's builder under `name`; `facts` are the fields of `ModelEntry`."""
    if name in _models:
        raise ValueError(f'name {name!r} is registered already')
    _models[name] = ModelEntry(name=name, build=build, **facts)


def attention_entry(name: str) -> AttentionEntry:
    """Returns the entry of a mechanism.

    Raises:
        ValueError: the name is not registered.
    """
    _load()
    return _find(_attention, 'attention', name)


def model_entry(name: str) -> ModelEntry:
    """Returns the entry of a network.

    Raises:
        ValueError: the name is not registered.
    """
    _load()
    return _find(_models, 'model', name)


def create_attention(name: str, /, **arguments: Any) -> nn.Module:
    """Builds a mechanism by its registry name.

    Args:
        name: registry name, e.g. 'gc'; `list_attention()` lists them.
        **arguments: fields of its class (`name` among them: what a Linen parent calls it).

    Returns:
        A Linen module, `[..., h, w, c]` to `[..., h, w, c]` unless its entry says otherwise.

    Raises:
        ValueError: unknown name or argument, or a value that the mechanism refuses.
    """
    entry = attention_entry(name)
    check_arguments(f'attention {name!r}', arguments, fields(entry.cls))
    return entry.cls(**arguments)


def starts_as_identity(module: nn.Module) -> bool:
    """Whether a mechanism, freshly initialised, returns its input; False if it is not ours."""
    _load()
    entries = [e.identity_at_init for e in _attention.values() if e.cls is type(module)]
    return any(found(module) if callable(found) else found for found in entries)


def create_model(name: str, /, **arguments: Any) -> nn.Module:
    """Builds a network by its registry name.

    Args:
        name: registry name, e.g. 'resnet50'; `list_models()` lists them.
        **arguments: `num_classes` (0 drops the head), `attention` (registry name of a mechanism),
            `placement`, `attention_args`, `dtype`, and what else the network's builder takes.

    Returns:
        A Linen module: `module(x [b, h, w, c], *, train=False, return_stages=False)` gives logits
        `[b, num_classes]`, or logits and a dict of named intermediates.

    Raises:
        ValueError: unknown name or argument, or a value that the network refuses.
    """
    return model_entry(name).build(**arguments)


def create_described(
    cls: type[nn.Module], description: Mapping[str, Any], arguments: Mapping[str, Any]
) -> nn.Module:
    """Builds a named network: a description of `cls` with what the caller changes in it.

    Args:
        cls: the network's class, with the fields `attention`, `placement` and `attention_args`.
        description: its fields under the name.
        arguments: the caller's.

    Raises:
        ValueError: an unknown argument, or a value that the network refuses.
    """
    check_arguments('this network', arguments, fields(cls))
    merged = {**description, **arguments}
    if merged.get('attention') != description.get('attention'):
        # Another mechanism: its own place and arguments, not those of the described one.
        for key in {'placement', 'attention_args'} - set(arguments):
            merged.pop(key, None)
    return cls(**merged)


def torch_names(entry: AttentionEntry | ModelEntry, module: nn.Module) -> TorchNames:
    """The naming schemes of an entry, for a module that it built."""
    return entry.torch_names(module) if callable(entry.torch_names) else entry.torch_names


def list_attention(pattern: str = '*') -> list[str]:
    """Returns the registry names of mechanisms that match a shell pattern, sorted."""
    _load()
    return sorted(fnmatch.filter(_attention, pattern))


def list_models(pattern: str = '*') -> list[str]:
    """Returns the registry names of networks that match a shell pattern, sorted."""
    _load()
    return sorted(fnmatch.filter(_models, pattern))


def _load() -> None:
    """Imports what registers itself."""
    import attention_jax.models
    import attention_jax.modules  # noqa: F401


def _find(entries: Mapping[str, Any], kind: str, name: str) -> Any:
    if name in entries:
        return entries[name]
    close = difflib.get_close_matches(str(name).lower(), entries, n=3)
    hint = f'did you mean {" or ".join(close)}?' if close else 'there is none like it.'
    listing = 'list_attention()' if kind == 'attention' else 'list_models()'
    raise ValueError(f'{kind} {name!r} is not registered: {hint} {listing} has all names')


def fields(cls: type[nn.Module]) -> list[str]:
    """Returns the names of a Linen module's own fields."""
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name != 'parent']


def check_arguments(what: str, arguments: Mapping[str, Any], allowed: list[str]) -> None:
    """Raises a ValueError for an argument that `what` does not take."""
    for argument in arguments:
        if argument not in allowed:
            close = difflib.get_close_matches(argument, allowed, n=1)
            hint = f', did you mean {close[0]}?' if close else ':'
            raise ValueError(
                f'{what} has no argument {argument!r}{hint} it takes {", ".join(allowed)}'
            )
