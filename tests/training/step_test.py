"""The step on one device and on eight, and what each option changes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from attention_jax import data
from attention_jax.tasks import open_source
from attention_jax.training import sharding
from attention_jax.training.program import make_program
from attention_jax.training.state import State, create_state
from configs import datasets, yolov4_tiny

# The update is minus the gradient.
PLAIN_SGD = {'name': 'sgd', 'learning_rate': 1.0, 'momentum': 0.0, 'nesterov': False}
PLAIN_SGD |= {'weight_decay': 0.0}


def plain_sgd(**settings: Any) -> ConfigDict:
    config = datasets.get_config('digits')
    config.optimizer.update(PLAIN_SGD)
    config.train.update({'batch_size': 16, **settings})
    return config


def plain_sgd_of_boxes() -> ConfigDict:
    """The same for detection, with a small network."""
    config = yolov4_tiny.get_config()
    config.model.arguments.width = 0.125
    config.data.image_size = 64
    config.optimizer.update(PLAIN_SGD)
    config.train.batch_size = 16
    return config


CONFIGS = {'classification': plain_sgd, 'detection': plain_sgd_of_boxes}


@functools.cache
def batch_of(task: str) -> dict[str, np.ndarray]:
    config = CONFIGS[task]()
    source = open_source(config, 'train', train=True)
    batches = data.train_batches(source, config.data, batch_size=16, seed=0)
    batch = next(batches)
    batches.close()
    return batch


def one_step(config: ConfigDict, devices: int, fsdp: int = 1, steps: int = 1) -> tuple[Any, ...]:
    """The state before, the state after, and what the step gave."""
    source = open_source(config, 'train', train=True)
    mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
    program = make_program(config, source.description, mesh)
    with jax.set_mesh(mesh):
        state = create_state(program.init, program.state, seed=0)
        before = jax.device_get((state.params, state.collections))
        batch = sharding.global_batch(mesh, batch_of(config.task))
        for _ in range(steps):
            state, outputs = program.train_step(state, batch)
        mask = sharding.global_batch(mesh, {'mask': np.repeat(np.float32([1, 0]), [11, 5])})
        if config.task == 'detection':  # what only its evaluation has
            mask |= sharding.global_batch(
                mesh,
                {
                    'ignore': np.zeros(batch['classes'].shape, bool),
                    'shape': np.full((16, 2), 64, np.int32),
                },
            )
        measured = program.eval_step(state.variables, batch | mask)
    return before, state, outputs, measured


@functools.cache
def on_one_device(task: str = 'classification') -> tuple[Any, ...]:
    return one_step(CONFIGS[task](), 1)


@pytest.mark.parametrize('fsdp', [1, 4])
def test_one_and_eight_devices_agree(fsdp):
    before, one, outputs_one, sums_one = on_one_device()
    _, eight, outputs_eight, sums_eight = one_step(plain_sgd(), 8, fsdp)

    def close(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    close(outputs_one['sums']['loss'] / 16, outputs_eight['sums']['loss'] / 16)
    close(outputs_one['grad_norm'], outputs_eight['grad_norm'])
    # The update is minus the gradient.
    jax.tree.map(
        lambda p, a, b: close(p - np.asarray(a), p - np.asarray(b)),
        before[0],
        one.params,
        eight.params,
    )
    jax.tree.map(close, one.collections, eight.collections)
    moved = jax.tree.map(lambda p, a: np.abs(p - a).max(), before[1], one.collections)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert sums_eight['count'] == 11
    close(sums_one['loss'], sums_eight['loss'])

    kernel = eight.params['stage3_block0']['conv2']['kernel']
    assert kernel.shape == (3, 3, 64, 64)
    shard = kernel.addressable_shards[0].data
    assert shard.shape == (3, 3, 64, 64 // fsdp)
    assert eight.params['head']['bias'].sharding.is_fully_replicated


def test_detection_agrees_on_one_and_eight_devices():
    before, one, outputs_one, found_one = on_one_device('detection')
    _, eight, outputs_eight, found_eight = one_step(plain_sgd_of_boxes(), 8, 2)

    def close(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(close, outputs_one, outputs_eight)
    jax.tree.map(
        lambda p, a, b: close(p - np.asarray(a), p - np.asarray(b)),
        before[0],
        one.params,
        eight.params,
    )
    jax.tree.map(close, one.collections, eight.collections)
    # The devices answer for different numbers of boxes: the means are over all of them.
    counts = (batch_of('detection')['classes'] >= 0).reshape(8, -1).sum(1)
    assert len(set(counts)) > 1
    assert {k: x.shape for k, x in found_one.items()} == {
        k: x.shape for k, x in found_eight.items()
    }
    assert all(x.sharding.is_fully_replicated for x in found_eight.values())
    assert outputs_one['sums']['count'] == 16


def test_the_initial_state_does_not_depend_on_the_devices():
    one, eight = on_one_device()[0], one_step(plain_sgd(), 8, 4)[0]
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_bfloat16_computes_in_it_and_keeps_float32():
    _, _, exact, _ = on_one_device()
    _, state, outputs, _ = one_step(plain_sgd(compute_dtype='bfloat16'), 1)
    for leaf in jax.tree.leaves((state.params, state.collections, outputs['sums']['loss'])):
        assert leaf.dtype == jnp.float32
    loss, low = exact['sums']['loss'], outputs['sums']['loss']
    assert loss != low
    np.testing.assert_allclose(loss, low, rtol=0.02)


def test_moving_average_is_evaluated():
    before, state, _, sums = one_step(plain_sgd(ema_decay=0.75), 1)
    new = {'params': state.params, **state.collections}
    old = {'params': before[0], **before[1]}
    expected = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, old, new)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, state.ema
    )
    assert sums['loss'] != on_one_device()[3]['loss']
    one_step(plain_sgd(ema_decay=0.75), 1, steps=2)  # each buffer is donated once


def test_step_compiles_from_shapes_alone():
    config = plain_sgd()
    mesh = sharding.make_mesh()
    program = make_program(config, open_source(config, 'train').description, mesh)
    assert isinstance(program.state, State)
    with jax.set_mesh(mesh):
        compiled = program.train_step.lower(program.state, program.batch).compile()
    assert 'all-reduce' in compiled.as_text()
