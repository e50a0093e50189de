"""What detection trains on: YOLO's loss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.tasks.detection import yolo
from attention_jax.tasks.task import Batch, Sums


def loss(outputs: Sequence[jax.Array], batch: Batch, **arguments: Any) -> tuple[jax.Array, Sums]:
    """Returns YOLO's loss in float32, and the sums of a training batch.

    Args:
        outputs: of the network.
        batch: 'boxes' `[b, m, 4]` and 'classes' `[b, m]`, as `yolo.loss` takes them.
        **arguments: the others of `yolo.loss`.
    """
    parts = yolo.loss(outputs, batch['boxes'], batch['classes'], **arguments)
    count = len(batch['image'])
    totals = {name: parts[name] * count for name in ('loss', 'box', 'object', 'class')}
    return parts['loss'], totals | {'count': jnp.int32(count)}
