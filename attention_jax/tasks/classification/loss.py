"""What classification trains on: cross-entropy."""

import jax
import jax.numpy as jnp
import optax

from attention_jax.tasks.task import Batch, Sums


def loss(logits: jax.Array, batch: Batch, *, label_smoothing: float) -> tuple[jax.Array, Sums]:
    """Returns the mean cross-entropy in float32, and the sums of a training batch.

    Args:
        logits: `[b, k]`.
        batch: 'label' integers `[b]`.
        label_smoothing: share of each label that is spread evenly over the classes.
    """
    logits = logits.astype(jnp.float32)
    labels = optax.smooth_labels(jax.nn.one_hot(batch['label'], logits.shape[-1]), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, labels)
    correct = logits.argmax(-1) == batch['label']
    totals = {'loss': losses.sum(), 'correct': correct.sum(), 'count': jnp.int32(losses.size)}
    return losses.mean(), totals
