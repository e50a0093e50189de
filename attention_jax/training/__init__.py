"""Training: `train(config, workdir)`, and what it is made of."""

from attention_jax.training.checkpoints import load
from attention_jax.training.loop import evaluate, train

__all__ = ['evaluate', 'load', 'train']
