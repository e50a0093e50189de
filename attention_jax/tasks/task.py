"""What a task is: a network and a handful of functions, under a name that a config says.

The training loop knows a task by these alone. A task is a folder beside `classification`, or a
user's file that calls `register_task`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from attention_jax import checks, data

Batch = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]
Measured = Mapping[str, Any]


def add_up(measured: Sequence[Measured]) -> dict[str, float]:
    """Adds up the sums of batches, name by name."""
    return {name: sum(sums[name].item() for sums in measured) for name in measured[0]}


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """Divides sums by the one that is called 'count'."""
    return {name: value / totals['count'] for name, value in totals.items() if name != 'count'}


class Task(NamedTuple):
    """A task bound to its data set and config.

    Attributes:
        model: the network.
        example: name -> shape and type of what a training batch holds, without the batch's axis.
        inputs: batch -> what the network takes; traced inside the step.
        loss: (outputs, batch) -> the mean loss to differentiate, and sums over the batch.
        measure: (outputs, batch with a mask) -> the arrays that an evaluation keeps of a batch;
            traced inside the step.
        results: what was kept of all batches, as NumPy arrays -> numbers by name.
        best: the result that ranks checkpoints; larger is better.
        metrics: the loss's sums added up over batches -> numbers by name.
        samples: (a batch, what was kept of it) -> name -> picture uint8 [h, w, 3], to look at.
        table: results -> lines to print at the end of a run, beside the numbers.
    """

    model: nn.Module
    example: Mapping[str, jax.ShapeDtypeStruct]
    inputs: Callable[[Batch], jax.Array]
    loss: Callable[[Any, Batch], tuple[jax.Array, Sums]]
    measure: Callable[[Any, Batch], Measured]
    results: Callable[[Sequence[Measured]], dict[str, float]]
    best: str
    metrics: Callable[[Mapping[str, float]], dict[str, float]] = means
    samples: Callable[[Batch, Measured], dict[str, np.ndarray]] = lambda batch, measured: {}
    table: Callable[[Mapping[str, float]], str] = lambda results: ''

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and types of a training batch."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype)
            for name, x in self.example.items()
        }


class TaskEntry(NamedTuple):
    """A registered task; see `register_task`."""

    open_split: Callable[..., data.Examples]
    create: Callable[[ConfigDict, Any], Task]
    description: Callable[..., data.Description]


_tasks: dict[str, TaskEntry] = {}


def register_task(
    name: str,
    open_split: Callable[..., data.Examples],
    create: Callable[[ConfigDict, Any], Task],
    *,
    description: Callable[..., data.Description] = data.Description,
) -> None:
    """Registers a task: from then on `config.task` can name it.

    A file that calls this belongs into the config's file, or is imported there: then a run, its
    evaluation and `attention-jax inspect` know the task. Who loads a run with
    `attention_jax.load` imports it first.

    Args:
        name: a later task takes the place of an earlier one of the same name.
        open_split: `open_split(config, split, preprocessing, train=...)` opens a part of the data
            that `config.data` names. `preprocessing` is that of pretrained weights, or None for the
            data set's own.
        create: `create(config, description)`, with the description of those data, or with what a
            work directory's config.json says of it: the same attributes, tuples as lists.
        description: makes one of the fields of `data.Description` alone, to inspect a program
            without its data.
    """
    _tasks[name] = TaskEntry(open_split, create, description)


def task_entry(name: str) -> TaskEntry:
    """Returns the entry of a task.

    Raises:
        ValueError: the name is not registered.
    """
    checks.choice('task', name, tuple(_tasks))
    return _tasks[name]


def open_source(
    config: ConfigDict, split: str, preprocessing: Any = None, *, train: bool = False
) -> data.Examples:
    """Opens a split of `config.data` for the task that `config.task` names.

    Args:
        config: the whole config (`attention_jax/config.py`).
        split: e.g. 'train', 'train[:90%]'.
        preprocessing: that of pretrained weights, or None for the data set's own.
        train: the examples are trained on.

    Raises:
        ValueError: unknown task, or data that are not there or not as they should be.
    """
    return task_entry(config.task).open_split(config, split, preprocessing, train=train)


def create_task(config: ConfigDict, description: Any) -> Task:
    """Returns the task that `config.task` names.

    Args:
        config: the whole config (`attention_jax/config.py`).
        description: the data set's, as its source or a work directory's config.json gives it.

    Raises:
        ValueError: unknown task, or a network or mechanism that cannot be built.
    """
    return task_entry(config.task).create(config, description)
