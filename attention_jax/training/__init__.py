"""Training: `train(config, workdir)`, and what it is made of."""

from attention_jax.training.checkpoints import load
from attention_jax.training.evaluation import evaluate
from attention_jax.training.loop import train

__all__ = ['evaluate', 'load', 'train']
