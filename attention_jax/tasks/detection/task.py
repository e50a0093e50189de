"""Detection of objects: YOLO's loss, and average precision."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from attention_jax import checks
from attention_jax.models.registry import list_models, model_entry
from attention_jax.tasks.detection import boxes, prediction, transforms, yolo
from attention_jax.tasks.detection.average_precision import average_precision
from attention_jax.tasks.detection.source import open_split
from attention_jax.tasks.network import build_model, plain
from attention_jax.tasks.task import Batch, Task, register_task

_SAMPLES = 4  # pictures with boxes that an evaluation shows
_SAMPLE_SCORE = 0.3  # of the least certain box drawn there


def create(config: ConfigDict, description: Any) -> Task:
    """Returns the task of a dataset; see `tasks.Task`.

    Raises:
        ValueError: a network that does not detect, or settings that are not allowed.
    """
    settings = config.detection
    for key in ('ignore_threshold', 'score_threshold', 'iou_threshold'):
        if not 0 <= settings[key] <= 1:
            raise ValueError(f'detection.{key} must be in 0 to 1, got {settings[key]}')
    if settings.class_weight is not None:
        checks.at_least('detection.class_weight', settings.class_weight, 0)
    for key in ('max_detections', 'max_boxes'):
        checks.at_least(f'detection.{key}', settings[key], 1)
    if model_entry(config.model.name).family != 'yolo':
        names = ', '.join(n for n in list_models() if n.startswith('yolo'))
        raise ValueError(f'model.name {config.model.name!r} does not detect: use one of {names}')
    model = build_model(
        config,
        description.num_classes,
        image_size=tuple(description.image_shape[:2]),
        **{key: plain(settings[key]) for key in ('anchors', 'masks') if settings[key]},
    )
    decoding = {
        'image_size': model.image_size,
        'anchors': model.anchors,
        'masks': model.masks,
    }
    return Task(
        model=model,
        abstract_batch=functools.partial(
            abstract_batch, image_shape=description.image_shape, max_boxes=settings.max_boxes
        ),
        inputs=functools.partial(inputs, dtype=config.train.compute_dtype),
        loss=functools.partial(
            loss,
            ignore_threshold=settings.ignore_threshold,
            class_weight=settings.class_weight,
            decoding=decoding,
        ),
        metrics=metrics,
        measure=functools.partial(
            measure,
            decoding=decoding,
            score_threshold=settings.score_threshold,
            iou_threshold=settings.iou_threshold,
            max_detections=settings.max_detections,
        ),
        results=functools.partial(results, class_names=tuple(description.class_names)),
        best='AP50',
        samples=functools.partial(samples, class_names=tuple(description.class_names)),
        table=table,
    )


def abstract_batch(
    batch_size: int, *, image_shape: tuple[int, int, int], max_boxes: int, train: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of a batch; one for evaluation may have more boxes."""
    batch = {
        'image': jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
        'boxes': jax.ShapeDtypeStruct((batch_size, max_boxes, 4), jnp.float32),
        'classes': jax.ShapeDtypeStruct((batch_size, max_boxes), jnp.int32),
    }
    if train:
        return batch
    return batch | {
        'ignore': jax.ShapeDtypeStruct((batch_size, max_boxes), jnp.bool_),
        'shape': jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
        'mask': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }


def inputs(batch: Batch, *, dtype: DTypeLike) -> jax.Array:
    """Returns 'image' uint8 `[b, h, w, c]` over 255."""
    return (batch['image'].astype(jnp.float32) / 255).astype(dtype)


def loss(
    outputs: Sequence[jax.Array],
    batch: Batch,
    *,
    ignore_threshold: float,
    class_weight: float | None,
    decoding: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns YOLO's loss in float32, and the sums of a training batch.

    Args:
        outputs: of the network.
        batch: 'boxes' `[b, m, 4]` and 'classes' `[b, m]`, as `yolo.loss` takes them.
        ignore_threshold: see there.
        class_weight: see there.
        decoding: `image_size`, `anchors`, `masks`, see there.
    """
    parts = yolo.loss(
        outputs,
        batch['boxes'],
        batch['classes'],
        ignore_threshold=ignore_threshold,
        class_weight=class_weight,
        **decoding,
    )
    count = len(batch['image'])
    totals = {name: parts[name] * count for name in ('loss', 'box', 'object', 'class')}
    return parts['loss'], totals | {'count': jnp.int32(count)}


def metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Returns the loss and its parts of the sums, as means over the images."""
    return {name: value / totals['count'] for name, value in totals.items() if name != 'count'}


def measure(
    outputs: Sequence[jax.Array],
    batch: Batch,
    *,
    decoding: Mapping[str, Any],
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> dict[str, jax.Array]:
    """Returns what is detected in a batch, beside what is there.

    Args:
        outputs: of the network.
        batch: of evaluation.
        decoding: `image_size`, `anchors`, `masks`.
        score_threshold: of the boxes that are kept.
        iou_threshold: see `yolo.detect`.
        max_detections: an image.

    Returns:
        'boxes' `[b, d, 4]`, (x1, y1, x2, y2) in pixels of the photo, 'scores' and 'classes'
        `[b, d]`; 'true_boxes' `[b, m, 4]`, (cx, cy, w, h) over the photo's sides, 'true_classes'
        and 'ignore' `[b, m]`; 'shape' `[b, 2]`, 'mask' `[b]`.
    """
    found = yolo.detect(
        outputs,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        **decoding,
    )
    photo = boxes.from_letterbox(found['boxes'], decoding['image_size'], batch['shape'][:, None])
    kept = {key: batch[key] for key in ('ignore', 'shape', 'mask')}
    kept |= {'true_boxes': batch['boxes'], 'true_classes': batch['classes']}
    return found | {'boxes': photo} | kept


def results(
    measured: Sequence[Mapping[str, np.ndarray]], class_names: Sequence[str]
) -> dict[str, float]:
    """Returns average precision over what `measure` gave for each batch."""
    detections, truths = [], []
    for batch in measured:
        for i in np.flatnonzero(batch['mask'] > 0):
            found, there = batch['classes'][i] >= 0, batch['true_classes'][i] >= 0
            detections.append({k: batch[k][i][found] for k in ('boxes', 'scores', 'classes')})
            height, width = batch['shape'][i]
            center, sides = np.split(batch['true_boxes'][i][there].astype(np.float64), 2, axis=-1)
            corners = np.concatenate([center - sides / 2, center + sides / 2], axis=-1)
            truths.append(
                {
                    'boxes': corners * np.array([width, height, width, height]),
                    'classes': batch['true_classes'][i][there],
                    'ignore': batch['ignore'][i][there],
                    'shape': (int(height), int(width)),
                }
            )
    return average_precision(detections, truths, class_names)


def samples(
    batch: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    class_names: Sequence[str],
) -> dict[str, np.ndarray]:
    """Returns the first photos of a batch with the boxes that were detected in them."""
    drawn = {}
    for number, i in enumerate(np.flatnonzero(batch['mask'] > 0)[:_SAMPLES]):
        shown = measured['scores'][i] >= _SAMPLE_SCORE
        photo = transforms.undo_letterbox(batch['image'][i], tuple(batch['shape'][i].tolist()))
        found = {key: measured[key][i][shown] for key in ('boxes', 'scores', 'classes')}
        drawn[f'detections/{number}'] = np.asarray(prediction.draw(photo, found, class_names))
    return drawn


def table(results: Mapping[str, float]) -> str:
    """Returns the average precision of each class, best first, a line each."""
    prefix = 'test/AP50/'
    rows = [(v, k.removeprefix(prefix)) for k, v in results.items() if k.startswith(prefix)]
    width = max(len(name) for name in ('class', *(name for _, name in rows)))
    lines = [f'{name:{width}}  {value:.4f}' for value, name in sorted(rows, reverse=True)]
    return '\n'.join([f'{"class":{width}}  AP50', *lines])


register_task('detection', open_split, create)
