"""One step of training and of evaluation: pure functions of state and batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attention_jax.tasks import Batch, Measured, Task
from attention_jax.training.state import State

TrainStep = Callable[[State, Batch], tuple[State, dict[str, Any]]]
EvalStep = Callable[[Mapping[str, Any], Batch], Measured]


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.0
) -> TrainStep:
    """Returns `train_step(state, batch) -> state, {'sums': the task's, 'grad_norm': []}`.

    Args:
        task: network, loss and sums.
        optimizer: see `optimizer.make_optimizer`.
        ema_decay: of the moving average, where the state keeps one.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        rngs = {'dropout': jax.random.fold_in(state.rng, state.step)}

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[dict[str, Any], Any]]:
            outputs, collections = task.model.apply(
                {'params': params, **state.collections},
                task.inputs(batch),
                train=True,
                mutable=list(state.collections),
                rngs=rngs,
            )
            loss, sums = task.loss(outputs, batch)
            return loss, (dict(collections), sums)

        grads, (collections, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = _moving_average(ema, {'params': params, **collections}, ema_decay)
        state = state.replace(
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            ema=ema,
        )
        return state, {'sums': sums, 'grad_norm': optax.tree.norm(grads)}

    return train_step


def make_eval_step(task: Task) -> EvalStep:
    """Returns `eval_step(variables, batch)`, which gives what the task keeps of a batch."""

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Measured:
        return task.measure(task.model.apply(variables, task.inputs(batch)), batch)

    return eval_step


def _moving_average(average: Any, new: Any, decay: float) -> Any:
    def mix(a: jax.Array, x: jax.Array) -> jax.Array:
        return a + (1 - decay) * (x - a) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(mix, average, new)
