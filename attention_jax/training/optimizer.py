"""Optimisers and schedules of the learning rate."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimiser of `config.optimizer`.

    `sgd` is PyTorch's: the (clipped) gradient plus `weight_decay` times the parameter goes through
    the momentum, and the rate multiplies the result. `adamw` decays apart from the gradient. What
    `frozen` names gets no update and does not count in the gradient's norm.

    Args:
        config: the group `optimizer`, checked (see `config.check`).
        schedule: update number -> learning rate; see `make_schedule`.
    """
    mask = decay_mask if config.decay_mask == 'norms_and_biases' else None
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == 'sgd':
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask))
        if config.momentum:
            parts.append(optax.trace(config.momentum, config.nesterov))
        parts.append(optax.scale_by_learning_rate(schedule))
    else:
        decay = config.weight_decay
        parts.append(optax.adamw(schedule, b1=config.momentum, weight_decay=decay, mask=mask))
    optimizer = optax.chain(*parts)
    if config.frozen:
        branches = {'trained': optimizer, 'frozen': optax.set_to_zero()}
        optimizer = optax.partition(branches, functools.partial(_labels, tuple(config.frozen)))
    if config.accumulate > 1:
        return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def decay_mask(params: Any) -> Any:
    """Returns a tree of True for what decays: arrays of two axes and more, biases apart."""

    def decays(path: tuple[Any, ...], x: jax.Array) -> bool:
        return x.ndim > 1 and getattr(path[-1], 'key', None) != 'bias'

    return jax.tree_util.tree_map_with_path(decays, params)


def _labels(frozen: Sequence[str], params: Mapping[str, Any]) -> dict[str, str]:
    """Which of the network's parts are trained."""
    unknown = [name for name in frozen if name not in params]
    if unknown:
        raise ValueError(
            f'optimizer.frozen has {unknown[0]!r}, which the network has not: '
            f'use some of {", ".join(params)}'
        )
    return {name: 'frozen' if name in frozen else 'trained' for name in params}


def make_schedule(
    config: ConfigDict, learning_rate: float, *, steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates done.

    After a linear warm-up from 0 over `warmup_epochs`, the rate is that of the named schedule at
    the same point of the run: `cosine` falls from `learning_rate` at the end of the warm-up to 0
    after `steps`; `steps` multiplies it by `factor` at each of `boundaries`, fractions of the whole
    run; `exponential` multiplies it by `factor` after each epoch; `constant` keeps it. `yolo` is
    bubbliiiing/yolov4-tiny-pytorch's, which changes once an epoch and has a warm-up of its own:
    for 5 % of the epochs, 1 to 3, it rises from a tenth as a parabola; for the last 5 %, 1 to 15,
    it is a hundredth; between them it falls as a cosine.

    Args:
        config: the group `schedule`, checked.
        learning_rate: at the top.
        steps: updates of the whole run.
        steps_per_epoch: updates of one epoch.

    Raises:
        ValueError: the warm-up is as long as the run.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise ValueError(
            f'schedule.warmup_epochs {config.warmup_epochs} must be shorter than the run of '
            f'{steps / steps_per_epoch:.4g} epochs'
        )

    def schedule(update: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(update, jnp.result_type(float))
        rate = learning_rate * (jnp.minimum(update / warmup, 1.0) if warmup else jnp.ones(()))
        if config.name == 'cosine':
            done = jnp.clip((update - warmup) / (steps - warmup), 0.0, 1.0)
            rate *= (1 + jnp.cos(jnp.pi * done)) / 2
        elif config.name == 'steps':
            for boundary in config.boundaries:
                rate *= jnp.where(update >= round(boundary * steps), config.factor, 1.0)
        elif config.name == 'exponential':
            rate *= config.factor ** jnp.floor(update / steps_per_epoch)
        elif config.name == 'yolo':
            rate *= _yolo(jnp.floor(update / steps_per_epoch), steps / steps_per_epoch)
        return rate

    return schedule


def _yolo(epoch: jax.Array, epochs: float) -> jax.Array:
    """The rate in an epoch of `epochs`, over that at the top."""
    rise = min(max(0.05 * epochs, 1), 3)
    last = min(max(0.05 * epochs, 1), 15)
    warm = 0.1 + 0.9 * (epoch / rise) ** 2
    done = (epoch - rise) / max(epochs - rise - last, 1)
    fall = 0.01 + 0.99 * (1 + jnp.cos(jnp.pi * done)) / 2
    return jnp.where(epoch <= rise, warm, jnp.where(epoch >= epochs - last, 0.01, fall))
