"""Names to networks: a network registers as a function of its arguments.

Importing `attention_jax.models` registers all of them.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from attention_jax import checks
from attention_jax.modules.registry import TorchNames, field_names


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
        task: what it is for: 'classification' or 'detection'.
        preprocessing: what is usual for its weights where they do not say: 'torchvision' (bilinear
            resizing), 'timm' (bicubic), or 'pixels' (whole pictures, over 255).
        rank: spatial axes of its input: 2, or 3 for videos.
        published: accuracies in per cent that others claim, and who does ('authors': in their
            repository or paper): top-1 on ImageNet-1k, one crop, unless said otherwise.
    """

    name: str
    build: Callable[..., nn.Module]
    family: str
    paper: str = ''
    input_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    torch_names: TorchNames | Callable[[Any], TorchNames] = dataclasses.field(default_factory=dict)
    task: str = 'classification'
    preprocessing: str = 'torchvision'
    rank: int = 2
    published: Sequence[tuple[float, str]] = ()


_models: dict[str, ModelEntry] = {}


def register_model(name: str, build: Callable[..., nn.Module], **facts: Any) -> None:
    """Registers a network's builder under `name`; `facts` are the fields of `ModelEntry`."""
    if name in _models:
        raise ValueError(f'name {name!r} is registered already')
    _models[name] = ModelEntry(name=name, build=build, **facts)


def model_entry(name: str) -> ModelEntry:
    """Returns the entry of a network.

    Raises:
        ValueError: the name is not registered.
    """
    return checks.registered('model', name, _models, 'list_models()')


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


def register_described(
    cls: type[nn.Module], name: str, description: Mapping[str, Any], **facts: Any
) -> None:
    """Registers a network that is a class with the fields of `description`, under `name`."""
    facts = {'num_classes': description.get('num_classes', cls.num_classes), **facts}
    register_model(name, functools.partial(create_described, cls, description), **facts)


def create_described(
    cls: type[nn.Module], description: Mapping[str, Any], /, **arguments: Any
) -> nn.Module:
    """Builds a named network: a description of `cls` with what the caller changes in it.

    Args:
        cls: the network's class, with the fields `attention`, `placement` and `attention_args`.
        description: its fields under the name.
        **arguments: the caller's.

    Raises:
        ValueError: an unknown argument, or a value that the network refuses.
    """
    checks.arguments('this network', arguments, field_names(cls))
    merged = {**description, **arguments}
    if merged.get('attention') != description.get('attention'):
        # Another mechanism: its own place and arguments, not those of the described one.
        for key in {'placement', 'attention_args'} - set(arguments):
            merged.pop(key, None)
    return cls(**merged)


def list_models(pattern: str = '*') -> list[str]:
    """Returns the registry names of networks that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_models, pattern))
