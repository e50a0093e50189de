"""Weights from one file to another: into a file of our own, or under PyTorch's names."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from attention_jax import checks
from attention_jax.interop import cards, files, torch
from attention_jax.interop.matching import Report
from attention_jax.interop.pretrained import Source, load_pretrained, open_weights
from attention_jax.modules.registry import field_names

FORMS = ('ours', 'torch')


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        model: registry name.
        arguments: what the module was created with.
        report: of the reading.
        parameters: number of trainable ones.
        arrays: number of arrays written.
        licence: of the weights, as far as the source says it.
    """

    model: str
    arguments: Mapping[str, Any]
    report: Report
    parameters: int
    arrays: int
    licence: str


def convert(
    source: Source,
    destination: str | os.PathLike[str],
    *,
    model: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    channels: int | None = None,
    to: str = 'ours',
    scheme: str | None = None,
) -> Converted:
    """Reads weights, and writes them to a safetensors file, whole or not at all.

    Args:
        source: see `load_pretrained`; `arguments` and `channels` too.
        destination: ends in .safetensors; a file there is replaced.
        model: registry name; None takes it from our card, the work directory or timm's config.json.
        arguments: of the network.
        channels: of the images.
        to: 'ours' writes our names and a card, 'torch' PyTorch's names.
        scheme: for 'torch', the naming scheme, such as 'timm'; None is the authors'.

    Raises:
        ValueError: what `load_pretrained` and `torch.to_state_dict` raise, a destination that
            cannot be written to, or a model that is not named.
    """
    checks.choice('to', to, FORMS)
    files.check_destination(destination)
    if scheme is not None and to == 'ours':
        raise ValueError(f"source {scheme!r} names PyTorch's scheme, and needs to='torch'")
    weights = open_weights(source)
    model = model or weights.model
    if model is None:
        raise ValueError(f'model is missing: {weights.source} does not say what network it is of')
    module, variables, report = load_pretrained(
        model, weights, channels=channels, **(arguments or {})
    )
    made_with = _arguments_of(model, module)
    if to == 'torch':
        arrays = torch.to_state_dict(model, variables, source=scheme, **made_with)
        files.write(destination, arrays, {'format': 'pt'})
    else:
        facts = {'source': weights.origin, 'licence': weights.licence}
        facts |= {'arguments': made_with, 'preprocessing': report.preprocessing}
        cards.save(destination, model, variables, **facts)
    return Converted(
        model=model,
        arguments=made_with,
        report=report,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables.get('params', {}))),
        arrays=len(jax.tree.leaves(variables)),
        licence=weights.licence,
    )


def _arguments_of(name: str, module: nn.Module) -> dict[str, Any]:
    """The arguments that create `module` again, but for the type that it computes in."""
    default = torch.build(name, {})[1]
    fields = set(field_names(type(module))) - {'name', 'dtype'}
    changed = {f for f in fields if getattr(module, f) != getattr(default, f)}
    if 'attention' in changed:  # another mechanism has a place and arguments of its own
        changed |= {'placement', 'attention_args'}
    return {field: _plain(getattr(module, field)) for field in sorted(changed)}


def _plain(value: Any) -> Any:
    """Turns the frozen mappings of Linen fields into dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
