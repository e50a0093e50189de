"""Data: sources of labelled pictures and the batches made of them.

Stands alone: nothing here imports the rest of the package, and importing it loads neither
TFDS, grain nor scikit-learn; the functions do when they are called.
"""

from attention_jax.data.labelled import Description, Source
from attention_jax.data.loader import (
    EvalBatches,
    Examples,
    eval_batches,
    number_of_steps,
    train_batches,
)
from attention_jax.data.sources import source

__all__ = [
    'Description',
    'EvalBatches',
    'Examples',
    'Source',
    'eval_batches',
    'number_of_steps',
    'source',
    'train_batches',
]
