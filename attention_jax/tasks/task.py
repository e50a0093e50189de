"""Tasks: where the examples come from, what a batch holds, the loss, what an evaluation keeps.

The training loop knows a task only as a `Task`, a handful of functions. A new task is a folder
beside `classification`, or a file of a user's, that calls `register_task`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from attention_jax import checks

Batch = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]
Measured = Mapping[str, Any]


def _no_samples(batch: Batch, measured: Measured) -> dict[str, np.ndarray]:
    del batch, measured
    return {}


def _no_table(results: Mapping[str, float]) -> str:
    del results
    return ''


class Task(NamedTuple):
    """A task bound to its dataset and config.

    Attributes:
        model: the network.
        abstract_batch: global batch size, `train=False` for evaluation -> shapes and types.
        inputs: batch -> what the network takes; traced inside the step.
        loss: (outputs, batch) -> the mean loss to differentiate, and sums over the batch.
        metrics: the loss's sums added up over batches -> numbers by name.
        measure: (outputs, batch with a mask) -> the arrays that an evaluation keeps of a batch;
            traced inside the step.
        results: what was kept of all batches, as NumPy arrays -> numbers by name.
        best: the result that ranks checkpoints; larger is better.
        samples: (a batch, what was kept of it) -> name -> picture uint8 [h, w, 3], to look at.
        table: results -> lines to print at the end of a run, beside the numbers.
    """

    model: nn.Module
    abstract_batch: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    inputs: Callable[[Batch], jax.Array]
    loss: Callable[[Any, Batch], tuple[jax.Array, Sums]]
    metrics: Callable[[Mapping[str, float]], dict[str, float]]
    measure: Callable[[Any, Batch], Measured]
    results: Callable[[Sequence[Measured]], dict[str, float]]
    best: str
    samples: Callable[[Batch, Measured], dict[str, np.ndarray]] = _no_samples
    table: Callable[[Mapping[str, float]], str] = _no_table


class TaskEntry(NamedTuple):
    """A registered task; `register_task` says what the functions are."""

    open_split: Callable[..., Any]
    create: Callable[[ConfigDict, Any], Task]


_tasks: dict[str, TaskEntry] = {}


def register_task(
    name: str,
    open_split: Callable[..., Any],
    create: Callable[[ConfigDict, Any], Task],
) -> None:
    """Registers a task, from then on a value of `config.task`.

    Args:
        name: a later one takes the place of an earlier one of its name.
        open_split: (config, split, preprocessing=None, *, train=False) -> what `data.train_batches`
            and `data.eval_batches` take.
        create: (config, description) -> `Task`, from the description that the source has, or that
            a work directory's config.json gives.
    """
    _tasks[name] = TaskEntry(open_split, create)


def task_entry(name: str) -> TaskEntry:
    """Returns the entry of a task.

    Raises:
        ValueError: the name is not registered.
    """
    checks.choice('task', name, tuple(_tasks))
    return _tasks[name]


def open_source(
    config: ConfigDict, split: str, preprocessing: Any = None, *, train: bool = False
) -> Any:
    """Opens a split of `config.data` for the task that `config.task` names.

    Args:
        config: the whole config (`configs/base.py`).
        split: e.g. 'train', 'train[:90%]'.
        preprocessing: that of pretrained weights, or None for the dataset's own.
        train: the examples are trained on.

    Returns:
        What `attention_jax.data.train_batches` and `eval_batches` take; its `description` goes to
        `create_task`.

    Raises:
        ValueError: unknown task, or data that are not there or not as they should be.
    """
    return task_entry(config.task).open_split(config, split, preprocessing, train=train)


def create_task(config: ConfigDict, description: Any) -> Task:
    """Returns the task that `config.task` names.

    Args:
        config: the whole config (`configs/base.py`).
        description: the dataset's, as its source or a work directory's config.json gives it.

    Raises:
        ValueError: unknown task, or a network or mechanism that cannot be built.
    """
    return task_entry(config.task).create(config, description)
