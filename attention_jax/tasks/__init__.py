"""Tasks: where the examples come from, what a batch holds, the loss, what an evaluation keeps.

A folder each, with the same file names for the same jobs; `task.py` says what a task is.
"""

from attention_jax.tasks import classification, detection
from attention_jax.tasks.network import build_model
from attention_jax.tasks.task import (
    Batch,
    Measured,
    Sums,
    Task,
    add_up,
    create_task,
    means,
    open_source,
    register_task,
)

__all__ = [
    'Batch',
    'Measured',
    'Sums',
    'Task',
    'add_up',
    'build_model',
    'classification',
    'create_task',
    'detection',
    'means',
    'open_source',
    'register_task',
]
