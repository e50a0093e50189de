"""The weights that a run starts from, `model.pretrained`, and how they want images prepared."""

import pathlib
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from attention_jax.interop import pretrained
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.training.runs import from_dataset, weights_in
from attention_jax.training.workdir import read_config


def preprocessing_of(config: ConfigDict, workdir: pathlib.Path) -> Preprocessing | None:
    """Returns the preprocessing of `model.pretrained`, or None for the dataset's own.

    A run that goes on has it in its work directory and does not look for the weights.
    """
    if not config.model.pretrained or config.data.preprocessing == 'dataset':
        return None
    if (workdir / 'config.json').is_file():
        return from_dataset(read_config(workdir).dataset)
    return pretrained.read_preprocessing(config.model.name, weights_in(config.model.pretrained))


def start_variables(
    config: ConfigDict, model: nn.Module, inputs: jax.ShapeDtypeStruct
) -> tuple[dict[str, Any], Any]:
    """Returns the variables of `model.pretrained` for the network, and a report of what is new.

    Raises:
        ValueError: the weights do not fit.
    """
    weights = weights_in(config.model.pretrained)
    return pretrained.load_variables(
        config.model.name, model, weights, inputs, seed=config.train.seed
    )
