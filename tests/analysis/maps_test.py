import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_without_a_map_there_is_an_error():
    model = attention_jax.create_model('tiny_resnet')
    x = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match='no mechanism'):
        attention_jax.attention_maps(model, model.init(jax.random.key(0), x), x)
