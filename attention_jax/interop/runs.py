"""Work directories of training as a source of weights: all that `interop` takes from `training`."""

import os

import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax.interop.preprocessing import Preprocessing, from_dataset


def describe(workdir: str | os.PathLike[str]) -> tuple[str, Preprocessing]:
    """The registry name of the network that was trained, and what prepared its images.

    Raises:
        ValueError: the directory holds no run.
    """
    from attention_jax.training.workdir import read_config

    config = read_config(workdir)
    return config.model.name, from_dataset(config.dataset)


def read(workdir: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """The network after the latest checkpoint, and its arrays by our path.

    Raises:
        ValueError: the directory holds no run, or no checkpoint.
    """
    from attention_jax.training.checkpoints import load

    module, variables, _ = load(workdir)
    flat = traverse_util.flatten_dict(variables, sep='/')
    return module, {path: np.asarray(value) for path, value in flat.items()}
