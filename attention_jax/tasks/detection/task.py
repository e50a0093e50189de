"""Detection of objects as a task."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from attention_jax.models.registry import list_models, model_entry
from attention_jax.tasks.detection.loss import loss
from attention_jax.tasks.detection.metrics import measure, results, table
from attention_jax.tasks.detection.prediction import samples
from attention_jax.tasks.detection.source import open_split
from attention_jax.tasks.network import build_model, plain
from attention_jax.tasks.task import Batch, Task, register_task


def create(config: ConfigDict, description: Any) -> Task:
    """Returns the task of a data set; see `tasks.create_task`.

    Raises:
        ValueError: a network that does not detect, or that refuses its anchors.
    """
    settings = config.detection
    if model_entry(config.model.name).task != 'detection':
        names = ', '.join(n for n in list_models() if model_entry(n).task == 'detection')
        raise ValueError(f'model.name {config.model.name!r} does not detect: use one of {names}')
    model = build_model(
        config,
        description.num_classes,
        image_size=tuple(description.image_shape[:2]),
        **{key: plain(settings[key]) for key in ('anchors', 'masks') if settings[key]},
    )
    decoding = {key: getattr(model, key) for key in ('image_size', 'anchors', 'masks')}
    losing = {key: settings[key] for key in ('ignore_threshold', 'class_weight')}
    finding = {key: settings[key] for key in ('score_threshold', 'iou_threshold', 'max_detections')}
    class_names = tuple(description.class_names)
    return Task(
        model=model,
        example={
            'image': jax.ShapeDtypeStruct(tuple(description.image_shape), jnp.uint8),
            'boxes': jax.ShapeDtypeStruct((settings.max_boxes, 4), jnp.float32),
            'classes': jax.ShapeDtypeStruct((settings.max_boxes,), jnp.int32),
        },
        inputs=functools.partial(inputs, dtype=config.train.compute_dtype),
        loss=functools.partial(loss, **decoding, **losing),
        measure=functools.partial(measure, **decoding, **finding),
        results=functools.partial(results, class_names=class_names),
        best='AP50',
        samples=functools.partial(samples, class_names=class_names),
        table=table,
    )


def inputs(batch: Batch, *, dtype: DTypeLike) -> jax.Array:
    """Returns 'image' uint8 `[b, h, w, c]` over 255."""
    return (batch['image'].astype(jnp.float32) / 255).astype(dtype)


register_task('detection', open_split, create)
