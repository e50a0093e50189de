"""What classification is measured by: cross-entropy and accuracy."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from attention_jax.tasks.task import Batch, Measured, add_up


def measure(logits: jax.Array, batch: Batch) -> Measured:
    """Returns sums over the examples whose mask is 1: cross-entropy, correct ones, their count.

    Args:
        logits: `[b, k]`.
        batch: 'label' integers `[b]` and 'mask' `[b]` of 0 (padding) and 1.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    correct = logits.argmax(-1) == batch['label']
    counts = batch['mask'] > 0
    return {
        'loss': jnp.where(counts, losses, 0).sum(),
        'correct': (correct & counts).sum(),
        'count': counts.sum(),
    }


def results(measured: Sequence[Measured]) -> dict[str, float]:
    """Returns the mean loss and the accuracy over what `measure` gave for each batch."""
    return metrics(add_up(measured))


def metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Returns the mean loss and the accuracy of sums."""
    return {
        'loss': totals['loss'] / totals['count'],
        'accuracy': totals['correct'] / totals['count'],
    }
