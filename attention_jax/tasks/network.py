"""The network of a config."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from attention_jax.models.registry import create_model


def build_model(config: ConfigDict, num_classes: int, **arguments: Any) -> nn.Module:
    """Returns the network of `config.model` with `num_classes` outputs.

    Args:
        config: the whole config (`attention_jax/config.py`).
        num_classes: the dataset's.
        **arguments: what the task tells the network beside.

    Raises:
        ValueError: unknown network, mechanism or argument, or another number of classes.
    """
    model = config.model
    if model.num_classes not in (None, num_classes):
        raise ValueError(
            f'model.num_classes {model.num_classes} is not the number of classes of the data, '
            f'{num_classes}: leave it out'
        )
    for key in ('attention', 'attention_args', 'placement', 'identity_init'):
        if model.get(key):
            arguments[key] = plain(model[key])
    if config.train.compute_dtype != 'float32':
        arguments['dtype'] = jnp.dtype(config.train.compute_dtype)
    return create_model(
        model.name,
        num_classes=num_classes,
        **arguments,
        **plain(model.arguments),
    )


def plain(value: Any) -> Any:
    """Turns what ml_collections or JSON made of dicts and tuples back into them."""
    if isinstance(value, ConfigDict):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    return value
