"""Detection of objects: YOLO's loss, and average precision."""

from attention_jax.tasks.detection import task

__all__ = ['task']
