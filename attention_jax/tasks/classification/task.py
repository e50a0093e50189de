"""Classification of images: cross-entropy and accuracy."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from attention_jax.tasks.classification.reading import open_split
from attention_jax.tasks.network import build_model
from attention_jax.tasks.task import Batch, Task, register_task


def create(config: ConfigDict, description: Any) -> Task:
    """Returns the task of a dataset; see `tasks.Task`."""
    return Task(
        model=build_model(config, description.num_classes),
        abstract_batch=functools.partial(abstract_batch, image_shape=description.image_shape),
        inputs=functools.partial(
            inputs, mean=description.mean, std=description.std, dtype=config.train.compute_dtype
        ),
        loss=functools.partial(loss, label_smoothing=config.train.label_smoothing),
        metrics=metrics,
        measure=measure,
        results=results,
        best='accuracy',
    )


def abstract_batch(
    batch_size: int, *, image_shape: tuple[int, int, int], train: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of a batch; one for evaluation has a mask."""
    batch = {
        'image': jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
        'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return batch if train else batch | {'mask': jax.ShapeDtypeStruct((batch_size,), jnp.float32)}


def inputs(
    batch: Batch, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike
) -> jax.Array:
    """Normalises images on the device.

    Args:
        batch: 'image' uint8 `[b, h, w, c]`.
        mean: over each channel, of values in 0 to 1.
        std: likewise.
        dtype: type of the result.

    Returns:
        `[b, h, w, c]`.
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    image = batch['image'].astype(jnp.float32)
    return (image * scale[None, None, None] - shift[None, None, None]).astype(dtype)


def loss(
    logits: jax.Array, batch: Batch, *, label_smoothing: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
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


def measure(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
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


def results(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean loss and the accuracy over what `measure` gave for each batch."""
    totals = {name: sum(sums[name].item() for sums in measured) for name in measured[0]}
    return metrics(totals)


def metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Returns the mean loss and the accuracy of sums."""
    return {
        'loss': totals['loss'] / totals['count'],
        'accuracy': totals['correct'] / totals['count'],
    }


register_task('classification', open_split, create)
