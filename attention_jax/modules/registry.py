"""Names to mechanisms.

A mechanism registers itself below its class, with what a reader, a test or a weight converter needs
to know about it. Importing `attention_jax.modules` registers all of them.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from attention_jax import checks

# How a foreign array maps to ours: a path, or a path with the einops pattern that turns their array
# into ours (for what is not a kernel of the usual layout), or all the names of a submodule.
# 'fc1.*' -> 'fc1/*' is a whole layer (weight, bias, running_mean, running_var), '{i}' is a number,
# and 'se.**' -> ('attention/**', names) is a submodule with names of its own. None is an array that
# the foreign module holds and never uses. A tuple of foreign names is one array of ours: theirs are
# stacked along a new first axis, which the pattern then speaks of.
ForeignName = str | tuple[str, ...]
TorchName = str | None | tuple[str, 'str | Mapping[str, TorchName]']
Scheme = dict[ForeignName, TorchName]  # the names of one naming scheme
TorchNames = Mapping[str, Mapping[ForeignName, TorchName]]  # naming scheme -> its names


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
        replaces_convolution: it stands in the place of a 3x3 convolution.
        placement: where a backbone puts it when it is not told: `models.placement.default`.
        variants: published forms: name -> arguments.
        torch_names: naming scheme -> foreign name -> our path, or a function of the module that
            gives it where names depend on arguments. The first scheme is the authors'.
        context_channels: for a mechanism that takes further maps after x, a function of a state
            dict's arrays that gives their channels: a tuple with a number for each map, and a tuple
            of numbers where one argument is a sequence of maps.
        maps: number of maps that it cannot be called without: x, and further ones.
        example: what it is built with to be tried or counted on a map of a given shape
            `[..., h, w, c]`, beside its defaults.
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
    replaces_convolution: bool = False
    placement: str = 'branch'
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    torch_names: TorchNames | Callable[[Any], TorchNames] = dataclasses.field(default_factory=dict)
    context_channels: Callable[[Mapping[str, Any]], tuple[Any, ...]] | None = None
    maps: int = 1
    example: Callable[[Sequence[int]], Mapping[str, Any]] = lambda shape: {}


_attention: dict[str, AttentionEntry] = {}


def register_attention(name: str, cls: type[nn.Module], **facts: Any) -> None:
    """Registers a mechanism's class under `name`; `facts` are the fields of `AttentionEntry`."""
    if name in _attention:
        raise ValueError(f'name {name!r} is registered already, by {_attention[name].cls}')
    _attention[name] = AttentionEntry(name=name, cls=cls, **facts)


def attention_entry(name: str) -> AttentionEntry:
    """Returns the entry of a mechanism.

    Raises:
        ValueError: the name is not registered.
    """
    return checks.registered('attention', name, _attention, 'list_attention()')


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
    checks.arguments(f'attention {name!r}', arguments, field_names(entry.cls))
    return entry.cls(**arguments)


def starts_as_identity(module: nn.Module) -> bool:
    """Whether a mechanism, freshly initialised, returns its input; False if it is not ours."""
    entries = [e.identity_at_init for e in _attention.values() if e.cls is type(module)]
    return any(found(module) if callable(found) else found for found in entries)


def list_attention(pattern: str = '*') -> list[str]:
    """Returns the registry names of mechanisms that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_attention, pattern))


def names_for(entry: Any, module: nn.Module) -> TorchNames:
    """The naming schemes of a mechanism's or a network's entry, for a module that it built."""
    return entry.torch_names(module) if callable(entry.torch_names) else entry.torch_names


def field_names(cls: type[nn.Module]) -> list[str]:
    """Returns the names of a Linen module's own fields."""
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name != 'parent']


def shared_fields(module: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """The fields of `cls`, a part of `module`, that `module` has under the same names."""
    return {f: getattr(module, f) for f in field_names(cls) if f != 'name' and hasattr(module, f)}


def spatial_rank(module: nn.Module) -> int:
    """Spatial axes of what a mechanism or network takes: `spatial_dims`, or 2 without the field."""
    return getattr(module, 'spatial_dims', 2)


def pointwise(layers: Mapping[str, str], spatial_dims: int = 2) -> Scheme:
    """Their 1x1 convolutions that are dense layers of ours: their layer -> our layer, as names."""
    pattern = f'o i {" ".join("1" * spatial_dims)} -> i o'
    return {f'{theirs}.*': (f'{ours}/*', pattern) for theirs, ours in layers.items()}
