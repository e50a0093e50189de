"""Tasks: what a batch holds, the loss, the sums for metrics.

The training loop knows a task only as a `Task`, a handful of functions. A new task is a file beside
`classification.py` with a `create(config, description)`, and a line in `_TASKS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from attention_jax import checks
from attention_jax.tasks import classification

Batch = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]

_TASKS = {'classification': classification}


class Task(NamedTuple):
    """A task bound to its dataset and config.

    Attributes:
        model: the network.
        abstract_batch: global batch size, `train=False` for evaluation -> shapes and types.
        inputs: batch -> what the network takes; traced inside the step.
        loss: (outputs, batch) -> the mean loss to differentiate, and sums over the batch.
        sums: (outputs, batch with a mask) -> sums over the examples that count.
        metrics: sums added up over batches -> numbers by name.
        best: the metric that ranks checkpoints; larger is better.
    """

    model: nn.Module
    abstract_batch: Callable[..., dict[str, jax.ShapeDtypeStruct]]
    inputs: Callable[[Batch], jax.Array]
    loss: Callable[[Any, Batch], tuple[jax.Array, Sums]]
    sums: Callable[[Any, Batch], Sums]
    metrics: Callable[[Mapping[str, float]], dict[str, float]]
    best: str


def create_task(config: ConfigDict, description: Any) -> Task:
    """Returns the task that `config.task` names.

    Args:
        config: the whole config (`configs/base.py`).
        description: the dataset's, as `attention_jax.data` gives it.

    Raises:
        ValueError: unknown task, or a network or mechanism that cannot be built.
    """
    checks.choice('task', config.task, list(_TASKS))
    return Task(**_TASKS[config.task].create(config, description))
