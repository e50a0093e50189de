"""Classification of images: cross-entropy and accuracy."""

from attention_jax.tasks.classification import task

__all__ = ['task']
