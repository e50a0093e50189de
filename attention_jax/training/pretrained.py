"""Weights from elsewhere: files, the hub and work directories; and those that a run starts from."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from attention_jax import checks
from attention_jax.interop import pretrained
from attention_jax.interop.matching import Report
from attention_jax.interop.preprocessing import PIXELS, Preprocessing
from attention_jax.interop.pretrained import Source, Weights
from attention_jax.modules.registry import field_names
from attention_jax.training.workdir import read_config


def load_pretrained(
    name: str,
    source: Source,
    *,
    channels: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> tuple[nn.Module, dict[str, Any], Report]:
    """Creates a network or mechanism with weights from a file, a run or the hub.

    What is asked for may differ from what the weights are of in three ways: another `num_classes`,
    another number of `channels`, and a mechanism (`attention`, with its arguments) where they have
    none. The rest is loaded, and the arrays that are new are initialised and reported.

    Args:
        name: registry name, e.g. 'resnet50'.
        source: a .safetensors file of PyTorch's names or of `interop.cards.save`; a .pth, .pt,
            .bin, .tar or .ckpt file, which needs PyTorch; a work directory of `training.train`; or
            a hub id such as 'timm/seresnet50.a1_in1k' (also 'hf_hub:ORGANISATION/NAME@REVISION'),
            which needs the extra `hub` and, the first time, a network.
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
    opened = weights_in(source)
    return pretrained.load_pretrained(name, opened, channels=channels, seed=seed, **arguments)


def weights_in(source: Source) -> Source:
    """The weights of the latest checkpoint where `source` is a work directory, else `source`.

    Raises:
        ValueError: the directory holds no run, or, when the weights are used, no checkpoint.
    """
    if isinstance(source, Weights) or not pathlib.Path(source).is_dir():
        return source
    # Not at the top: whoever reads a file needs neither Orbax nor the loaders.
    from attention_jax.training import checkpoints

    config = read_config(source)
    run = functools.cache(lambda: checkpoints.load(source)[:2])

    def create(arguments: Mapping[str, Any]) -> nn.Module:
        module, _ = run()
        checks.arguments(f'the network of {source}', arguments, field_names(type(module)))
        return module.clone(**arguments)

    def read() -> dict[str, np.ndarray]:
        flat = traverse_util.flatten_dict(run()[1], sep='/')
        return {path: np.asarray(value) for path, value in flat.items()}

    return Weights(
        str(source),
        read,
        config.model.name,
        create,
        preprocessing=from_dataset(config.dataset),
        origin=str(source),
    )


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


def from_dataset(dataset: Mapping[str, Any]) -> Preprocessing:
    """What the group `dataset` of a work directory's config.json says of the images."""
    size = tuple(dataset['image_shape'][:2])
    if 'mean' not in dataset:  # one of boxes
        return dataclasses.replace(PIXELS, input_size=size)
    return Preprocessing(
        mean=tuple(dataset['mean']),
        std=tuple(dataset['std']),
        crop=dataset['crop'],
        interpolation=dataset['interpolation'],
        input_size=size,
    )
