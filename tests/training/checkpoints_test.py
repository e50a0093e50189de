import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from attention_jax.training import checkpoints, sharding
from attention_jax.training.state import State, abstract_state, create_state, make_init
from configs import datasets


class Net(nn.Module):
    """Something with parameters and statistics."""

    features: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dense(self.features)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


def make(devices: int = 8, fsdp: int = 2, *, ema: bool = False, features: int = 128) -> State:
    """The abstract state and the state."""
    mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:devices])
    inputs = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    optimizer = optax.sgd(0.1, momentum=0.9)
    init = make_init(Net(features), optimizer, inputs, ema=ema)
    abstract = abstract_state(init, mesh)
    return abstract, create_state(init, abstract, 0)


def save(directory, state, *, steps=(1,), metrics=None):
    with checkpoints.open_manager(directory, 'test/accuracy') as manager:
        for step in steps:
            accuracy = metrics.get(step) if metrics else None
            checkpoints.save(
                manager,
                step,
                state.replace(step=jnp.full_like(state.step, step)),
                {'position': {'next_index': step}},
                None if accuracy is None else {'test/accuracy': accuracy},
            )


def equal(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, a, b)


def test_best_stays_beside_the_latest_two(tmp_path):
    _, state = make()
    accuracies = {1: 0.1, 2: 0.9, 4: 0.2, 6: 0.12}
    save(tmp_path, state, steps=range(1, 8), metrics=accuracies)
    with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
        assert sorted(manager.all_steps()) == [2, 6, 7]
        assert manager.best_step() == 2
        assert manager.metrics(2) == {'test/accuracy': 0.9}


@pytest.mark.parametrize('ema', [False, True])
def test_eight_devices_to_one_and_back(tmp_path, ema):
    _, state = make(8, 2, ema=ema)
    save(tmp_path, state)
    for devices, fsdp in ((1, 1), (8, 4)):
        there, _ = make(devices, fsdp, ema=ema)
        with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
            restored, saved = checkpoints.restore(manager, there)
        assert saved == {'position': {'next_index': 1}}
        equal(restored.replace(step=state.step), state)
        assert restored.params['Dense_0']['kernel'].sharding.mesh.size == devices


def test_no_checkpoint(tmp_path):
    abstract, _ = make()
    with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
        assert checkpoints.restore(manager, abstract) is None


def test_an_emptied_step_is_passed_over_and_no_longer_in_the_way(tmp_path):
    abstract, state = make()
    save(tmp_path, state, steps=(1, 2))
    (tmp_path / '5').mkdir()
    with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
        with pytest.warns(UserWarning, match='/5 holds no state: trying the one before'):
            restored, _ = checkpoints.restore(manager, abstract)
        assert restored.step == 2
        checkpoints.save(manager, 5, state, {}, None)
        manager.wait_until_finished()
        with pytest.raises(RuntimeError, match='step 5 was not saved'):
            checkpoints.save(manager, 5, state, {}, None)


def test_a_leftover_of_a_kill_during_a_save_is_no_step(tmp_path):
    abstract, state = make()
    save(tmp_path, state, steps=(1,))
    (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
    with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
        restored, _ = checkpoints.restore(manager, abstract)
        assert restored.step == 1
        checkpoints.save(manager, 2, state, {}, None)


def test_what_does_not_fit_is_refused_with_the_difference(tmp_path):
    _, state = make()
    save(tmp_path, state)
    with checkpoints.open_manager(tmp_path, 'test/accuracy') as manager:
        wider, _ = make(features=256)
        message = r'params/Dense_0/bias is float32\[128\] there and float32\[256\] here.* 7 more'
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(manager, wider)
        averaged, _ = make(ema=True)
        with pytest.raises(ValueError, match=r'ema/.* is missing there and float32.* and 3 more'):
            checkpoints.restore(manager, averaged)
        # Orbax itself would cast.
        other, _ = make()
        other = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
                if x.dtype == jnp.float32
                else x
            ),
            other,
        )
        with pytest.raises(ValueError, match=r'float32.* there and bfloat16.* here'):
            checkpoints.restore(manager, other)


@pytest.mark.parametrize('ema', [False, True])
def test_variables_need_no_network(tmp_path, ema):
    _, state = make(ema=ema)
    save(tmp_path, state)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with checkpoints.open_manager(tmp_path, read_only=True) as manager:
        step, variables = checkpoints.restore_variables(manager, mesh)
    assert step == 1
    equal(variables, state.variables)


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r'holds no run: it has no config.json'):
        checkpoints.load(tmp_path)
    config = datasets.get_config('digits').to_dict()
    config['dataset'] = {'num_classes': 10, 'image_shape': [32, 32, 1], 'mean': [0.3], 'std': [0.3]}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='holds no checkpoint: train first'):
        checkpoints.load(tmp_path)
    assert not (tmp_path / 'checkpoints').exists()
