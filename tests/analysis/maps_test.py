import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import attention_jax
from tests import helpers


def test_maps_of_a_mechanism_and_a_network():
    x = jnp.asarray(helpers.array((2, 8, 8, 16), dtype=np.float32))
    se = attention_jax.SqueezeExcite()
    maps = attention_jax.attention_maps(se, se.init(jax.random.key(0), x), x)
    assert {k: v.shape for k, v in maps.items()} == {'map': (2, 16)}

    model = attention_jax.create_model('tiny_resnet', attention='se')
    variables = model.init(jax.random.key(0), x)
    maps = attention_jax.attention_maps(model, variables, x)
    assert {k: v.shape for k, v in maps.items()} == {
        'stage1_block0/attention': (2, 16),
        'stage2_block0/attention': (2, 32),
        'stage3_block0/attention': (2, 64),
    }


def test_rows_of_chosen_queries():
    x = jnp.asarray(helpers.array((1, 6, 4, 16), dtype=np.float32))
    module = attention_jax.create_attention('non_local')
    variables = module.init(jax.random.key(0), x)
    (whole,) = attention_jax.attention_maps(module, variables, x).values()
    (rows,) = attention_jax.attention_maps(module, variables, x, queries=(5, 0)).values()
    assert whole.shape == (1, 24, 6)
    np.testing.assert_allclose(rows, whole[:, jnp.asarray([5, 0])], rtol=1e-6)
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match='0 to 23'):
        attention_jax.attention_maps(module, variables, x, queries=(24,))


def _network():
    # Arguments are a dict: a network without a hash of its own.
    return attention_jax.create_model(
        'tiny_resnet',
        attention='non_local',
        attention_args={'mode': 'dot_product'},
        placement='after_block',
    )


def test_each_mechanism_counts_its_own_positions():
    x = jnp.asarray(helpers.array((2, 8, 8, 3), dtype=np.float32))
    variables = helpers.random_variables(_network(), x, dtype=np.float32)
    whole = attention_jax.attention_maps(_network(), variables, x)
    rows = attention_jax.attention_maps(_network(), variables, x, queries=[3, np.int64(0)])
    assert sorted(y.shape[1] for y in whole.values()) == [4, 16, 64]
    assert rows.keys() == whole.keys()
    for path, y in whole.items():
        helpers.assert_close(rows[path], y[:, jnp.asarray([3, 0])], 1e-5)
    with pytest.raises(ValueError, match=r'0 to 3, got \(4,\)'):
        attention_jax.attention_maps(_network(), variables, x, queries=(4,))
    with pytest.raises(ValueError, match='0 to'):
        attention_jax.attention_maps(_network(), variables, x, queries=(-1,))


def test_a_gate_has_no_queries():
    x = jnp.ones((1, 4, 4, 16))
    se = attention_jax.SqueezeExcite()
    maps = attention_jax.attention_maps(se, se.init(jax.random.key(0), x), x, queries=(99,))
    assert maps['map'].shape == (1, 16)


def test_a_second_call_does_not_trace():
    traces = []

    class Counted(nn.Module):
        arguments: dict

        @nn.compact
        def __call__(self, x):
            traces.append(x.shape)
            return attention_jax.NonLocal(**self.arguments)(x)

    def run(x, queries=None):
        """How often the module is traced; a new one each time, equal by value."""
        before = len(traces)
        attention_jax.attention_maps(Counted({'pool_size': 1}), variables, x, queries=queries)
        return len(traces) - before

    x = jnp.ones((1, 4, 4, 8))
    variables = Counted({'pool_size': 1}).init(jax.random.key(0), x)
    assert run(x) == 1
    assert run(2 * x) == 0
    assert run(x, (5, 0)) == 2  # once for the number of positions
    assert run(x, (1, 2)) == 0
    assert run(x) == 0
    assert run(x[:, :2]) == 1


def test_without_a_map_there_is_an_error():
    model = attention_jax.create_model('tiny_resnet')
    x = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match='no mechanism'):
        attention_jax.attention_maps(model, model.init(jax.random.key(0), x), x)
