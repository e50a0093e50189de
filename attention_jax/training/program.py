"""From a config to what a run computes: the one assembly, for training, evaluation and inspection.

Nothing is computed or compiled here, and the devices need not be there.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from attention_jax.tasks import Batch, Task, create_task
from attention_jax.training import sharding
from attention_jax.training.optimizer import make_optimizer, make_schedule
from attention_jax.training.state import State, abstract_state, make_init
from attention_jax.training.step import make_eval_step, make_train_step


class Length(NamedTuple):
    """The length of a run in batches; an epoch need not be a whole number of them."""

    steps: int
    steps_per_epoch: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes on a mesh.

    Attributes:
        task: network, loss, and what an evaluation makes of its outputs.
        mesh: the devices.
        inputs: shape and type of what the network takes of one example, `[1, ...]`.
        batch: shapes, types and shardings of a batch to train on.
        schedule: number of updates done -> learning rate.
        init: random key -> the state before the first step.
        state: its shapes, types and shardings.
        train_step: jitted: (state, batch) -> state, {'sums': the task's, 'grad_norm': []}; the new
            state takes the memory of the one given.
        eval_step: jitted: (variables, batch with a mask) -> what the task keeps of the batch.
    """

    task: Task
    mesh: Mesh
    inputs: jax.ShapeDtypeStruct
    batch: Batch
    schedule: optax.Schedule
    init: Callable[[jax.Array], State]
    state: State
    train_step: Any
    eval_step: Any


def make_program(
    config: ConfigDict, description: Any, mesh: Mesh, length: Length | None = None
) -> Program:
    """Puts together what a config asks for, with a data set on a mesh.

    To compile a step without data, for devices that need not be there:
    `program.train_step.lower(program.state, program.batch).compile()`.

    Args:
        config: checked, see `config.check`.
        description: the data set's.
        mesh: see `sharding.make_mesh`.
        length: of the run; without one the learning rate is always that of the schedule's top,
            which changes no shape.

    Raises:
        ValueError: a network or mechanism that cannot be built, or a warm-up longer than the run.
    """
    task = create_task(config, description)
    inputs = jax.eval_shape(task.inputs, task.abstract_batch(1))
    batch = sharding.with_batch_sharding(mesh, task.abstract_batch(config.train.batch_size))

    rate, accumulate = config.optimizer.learning_rate, config.optimizer.accumulate
    if length is None:
        schedule = optax.constant_schedule(rate)
    else:
        schedule = make_schedule(
            config.schedule,
            rate,
            steps=math.ceil(length.steps / accumulate),
            steps_per_epoch=length.steps_per_epoch / accumulate,
        )
    optimizer = make_optimizer(config.optimizer, schedule)

    ema_decay = config.train.ema_decay
    init = make_init(task.model, optimizer, inputs, ema=ema_decay > 0)
    state = abstract_state(init, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return Program(
        task=task,
        mesh=mesh,
        inputs=inputs,
        batch=batch,
        schedule=schedule,
        init=init,
        state=state,
        train_step=jax.jit(
            make_train_step(task, optimizer, ema_decay=ema_decay),
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
        eval_step=jax.jit(make_eval_step(task), out_shardings=sharding.replicated(mesh)),
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = pathlib.Path.home() / '.cache' / 'attention_jax' / 'xla'
        jax.config.update('jax_compilation_cache_dir', str(folder))
