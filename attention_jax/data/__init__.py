"""Data: what all tasks share, from prepared data sets to batches.

Stands alone: nothing here imports a network or a task, and importing it loads neither TFDS, grain
nor scikit-learn; the functions do when they are called.
"""

from attention_jax.data.examples import Description, Examples
from attention_jax.data.loader import (
    EvalBatches,
    eval_batches,
    number_of_steps,
    train_batches,
)

__all__ = [
    'Description',
    'EvalBatches',
    'Examples',
    'eval_batches',
    'number_of_steps',
    'train_batches',
]
