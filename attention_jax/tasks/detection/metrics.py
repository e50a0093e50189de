"""What detection is measured by: average precision of the boxes in each photo."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attention_jax.tasks.detection import boxes, yolo
from attention_jax.tasks.detection.average_precision import average_precision
from attention_jax.tasks.task import Batch, Measured


def measure(outputs: Sequence[jax.Array], batch: Batch, **arguments: Any) -> Measured:
    """Returns what is detected in a batch, beside what is there.

    Args:
        outputs: of the network.
        batch: of evaluation.
        **arguments: the others of `yolo.detect`.

    Returns:
        'boxes' `[b, d, 4]`, (x1, y1, x2, y2) in pixels of the photo, 'scores' and 'classes'
        `[b, d]`; 'true_boxes' `[b, m, 4]`, (cx, cy, w, h) over the photo's sides, 'true_classes'
        and 'ignore' `[b, m]`; 'shape' `[b, 2]`, 'mask' `[b]`.
    """
    found = yolo.detect(outputs, **arguments)
    photo = boxes.from_letterbox(found['boxes'], arguments['image_size'], batch['shape'][:, None])
    kept = {key: batch[key] for key in ('ignore', 'shape', 'mask')}
    kept |= {'true_boxes': batch['boxes'], 'true_classes': batch['classes']}
    return found | {'boxes': photo} | kept


def results(measured: Sequence[Measured], class_names: Sequence[str]) -> dict[str, float]:
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


def table(results: Mapping[str, float]) -> str:
    """Returns the average precision of each class, best first, a line each."""
    prefix = 'test/AP50/'
    rows = [(v, k.removeprefix(prefix)) for k, v in results.items() if k.startswith(prefix)]
    width = max(len(name) for name in ('class', *(name for _, name in rows)))
    lines = [f'{name:{width}}  {value:.4f}' for value, name in sorted(rows, reverse=True)]
    return '\n'.join([f'{"class":{width}}  AP50', *lines])
