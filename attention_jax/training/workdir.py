"""The work directory: which run it belongs to, and what is written there at the start."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from attention_jax import files
from attention_jax.config import flatten

# Keys whose values, or beginnings of keys, decide what the weights of a run are of.
NETWORK_KEYS = ('task', 'model.', 'data.name', 'detection.anchors', 'detection.masks')


def read_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Returns the config of a work directory; its group `dataset` tells what the data were.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = pathlib.Path(workdir) / 'config.json'
    if not path.is_file():
        raise ValueError(f'workdir {workdir} holds no run: it has no {path.name}')
    try:
        return ConfigDict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is damaged: {error}') from None


def refuse_another_config(
    config: ConfigDict, workdir: pathlib.Path, keys: tuple[str, ...] = ('',)
) -> None:
    """Raises a ValueError with the differences if `workdir` was trained with another config.

    Args:
        config: the one asked for.
        workdir: may be missing.
        keys: compare only dotted keys that start with one of these.
    """
    if not (workdir / 'config.json').is_file():
        return
    configs = read_config(workdir), config
    there, here = (flatten(json.loads(c.to_json_best_effort())) for c in configs)
    different = [
        f'{key} is {json.dumps(there.get(key))} there and {json.dumps(here.get(key))} here'
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
        and key.startswith(keys)
        and not key.startswith('dataset.')
    ]
    if different:
        raise ValueError(
            f'workdir {workdir} belongs to another config: {"; ".join(different)}. '
            f'Choose another with --workdir; --config.model.pretrained={workdir} there starts from '
            'the weights of this one'
        )


def check_classes(workdir: pathlib.Path, description: Any) -> None:
    """Raises a ValueError if the classes of the data are not those that `workdir` was trained on.

    Args:
        workdir: may be missing.
        description: the dataset's.
    """
    if not (workdir / 'config.json').is_file():
        return
    difference = _difference(read_config(workdir).dataset.class_names, description.class_names)
    if difference:
        raise ValueError(
            f'workdir {workdir} was trained on other classes than {description.name!r} has: '
            f'{difference}. Give the data the same class list, or choose another workdir'
        )


def check_same_classes(source: Any, test_source: Any) -> None:
    """Raises a ValueError if two splits, for training and evaluation, differ in their classes."""
    names = source.description.class_names, test_source.description.class_names
    difference = _difference(*names)
    if difference:
        raise ValueError(
            f'data.test_split {test_source.split!r} of {source.description.name!r} has other '
            f'classes than data.split {source.split!r}: {difference}. Give both the same list'
        )


def _difference(there: Sequence[str], here: Sequence[str]) -> str:
    """How two lists of classes differ; empty if they do not."""
    if tuple(there) == tuple(here):
        return ''
    missing = ', '.join(sorted(set(there) - set(here))[:5]) or 'none'
    new = ', '.join(sorted(set(here) - set(there))[:5]) or 'none'
    return f'{len(there)} and {len(here)}, in their order (missing: {missing}; new: {new})'


def write_description(
    workdir: pathlib.Path, config: ConfigDict, description: Any, table: str
) -> None:
    """Writes config.json, with the dataset's description, and parameters.txt.

    Args:
        workdir: work directory.
        config: the resolved config.
        description: the dataset's, as `attention_jax.data` gives it.
        table: of parameters.
    """
    # What load(workdir) and a prediction need to know.
    dataset = dataclasses.asdict(description)
    resolved = json.loads(config.to_json_best_effort()) | {'dataset': dataset}
    if jax.process_index() == 0:
        files.write_json(workdir / 'config.json', resolved)
        files.write_text(workdir / 'parameters.txt', table + '\n')
