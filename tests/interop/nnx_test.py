"""Networks and mechanisms as NNX modules: the same bits there and back, the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import attention_jax
from attention_jax.interop import cards
from attention_jax.interop import nnx as bridge
from tests import helpers

NETWORK = {
    'attention': 'self_attention',
    'attention_args': {'spectral_norm': True},
    'placement': 'branch@2',
    'drop_path_rate': 0.5,
}
SHAPE = (2, 8, 8, 3)


def network():
    module = attention_jax.create_model('tiny_resnet', **NETWORK)
    x = helpers.array(SHAPE, dtype=np.float32)
    return module, helpers.random_variables(module, x, dtype=np.float32), x


def assert_same(got, want):
    got, want = (traverse_util.flatten_dict(tree, sep='/') for tree in (got, want))
    assert set(got) == set(want)
    for path, value in want.items():
        assert got[path].dtype == value.dtype
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_every_collection_there_and_back():
    module, variables, x = network()
    variables['params'] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables['params'])
    model = bridge.to_nnx(module, variables, x)
    back = bridge.from_nnx(model)
    assert set(back) == {'params', 'batch_stats', 'spectral'}
    assert_same(back, variables)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def test_results_and_training_are_linens():
    module, variables, x = network()
    model = bridge.to_nnx(module, variables, x, rngs=nnx.Rngs(dropout=0))
    out = nnx.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_array_equal(out, jax.jit(module.apply)(variables, x))

    @nnx.jit
    def train(model, x):
        return model(x, train=True, mutable=['batch_stats', 'spectral'])

    assert np.isfinite(train(model, x)).all()
    after = bridge.from_nnx(model)
    assert_same({'params': after['params']}, {'params': variables['params']})
    for collection in ('batch_stats', 'spectral'):
        changed = jax.tree.map(
            lambda a, b: (a != b).any(), after[collection], variables[collection]
        )
        assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize('name', ['cbam', 'gc'])
def test_a_file_of_ours_opens_in_both(tmp_path, name):
    path = tmp_path / 'x.safetensors'
    x = helpers.array((2, 5, 6, 16), dtype=np.float32)
    module = attention_jax.create_attention(name)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    cards.save(path, name, variables)
    module, loaded, _ = attention_jax.load_pretrained(name, path)
    model = bridge.to_nnx(module, loaded, x)
    np.testing.assert_array_equal(model(x), module.apply(variables, x))
    cards.save(path, name, bridge.from_nnx(model))
    assert_same(attention_jax.load_pretrained(name, path)[1], variables)


def test_variables_that_do_not_fit():
    module, variables, x = network()
    del variables['spectral']
    variables['params']['head']['kernel'] = np.ones((64, 3), np.float32)
    variables['params']['more'] = np.ones(1, np.float32)
    with pytest.raises(ValueError, match=r'variables do not fit .*params/head/kernel') as error:
        bridge.to_nnx(module, variables, x)
    assert 'params/more' in str(error.value)
    assert 'spectral/' in str(error.value)
