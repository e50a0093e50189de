"""Classification of images as a task."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from attention_jax.tasks.classification.loss import loss
from attention_jax.tasks.classification.metrics import measure, metrics, results
from attention_jax.tasks.classification.reading import Description
from attention_jax.tasks.classification.source import open_split
from attention_jax.tasks.network import build_model
from attention_jax.tasks.task import Batch, Task, register_task


def create(config: ConfigDict, description: Description) -> Task:
    """Returns the task of a data set; see `tasks.create_task`."""
    return Task(
        model=build_model(config, description.num_classes),
        example={
            'image': jax.ShapeDtypeStruct(tuple(description.image_shape), jnp.uint8),
            'label': jax.ShapeDtypeStruct((), jnp.int32),
        },
        inputs=functools.partial(
            inputs, mean=description.mean, std=description.std, dtype=config.train.compute_dtype
        ),
        loss=functools.partial(loss, label_smoothing=config.train.label_smoothing),
        metrics=metrics,
        measure=measure,
        results=results,
        best='accuracy',
    )


def inputs(
    batch: Batch, *, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike
) -> jax.Array:
    """Normalises 'image' uint8 `[b, h, w, c]` by channel, on the device.

    Args:
        batch: of examples.
        mean: over each channel, of values in 0 to 1.
        std: likewise.
        dtype: type of the result.
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    image = batch['image'].astype(jnp.float32)
    return (image * scale[None, None, None] - shift[None, None, None]).astype(dtype)


register_task('classification', open_split, create, description=Description)
