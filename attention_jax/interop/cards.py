"""Files of our own: safetensors whose arrays have our paths ('params/head/kernel'), and a card.

The card stands in the metadata and says what the arrays are of.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from attention_jax.interop import files, torch
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.version import __version__

_KEY = 'attention_jax'  # of the card in the metadata


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
        arguments: this and the rest, see `Card`.
        source: for a reader.
        licence: for a reader.
        preprocessing: for whoever prepares images.

    Raises:
        ValueError: an unknown name or argument, one that JSON cannot hold, or a path that cannot be
            written to.
    """
    arguments = dict(arguments or {})
    torch.build(module_name, arguments)
    card = Card(module_name, arguments, source, licence, preprocessing, __version__)
    facts = vars(card) | {'preprocessing': preprocessing and vars(preprocessing)}
    arrays = traverse_util.flatten_dict(dict(variables), sep='/')
    files.write(path, arrays, {_KEY: json.dumps(facts, default=_type_name)})


def read_card(path: str | os.PathLike[str]) -> Card | None:
    """Returns the card of a file of our own, None if the file is not ours.

    Raises:
        ValueError: the file is damaged.
    """
    path = pathlib.Path(path)
    text = files.read_metadata(path).get(_KEY)
    if text is None:
        return None
    try:
        card = json.loads(text)
        facts = {field.name: revive(card[field.name]) for field in dataclasses.fields(Card)}
        images = facts['preprocessing']
        facts['preprocessing'] = images and Preprocessing(**images)
        return Card(**facts | {'arguments': {**facts['arguments']}})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
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
