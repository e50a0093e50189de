"""Mechanisms that are put into a network so that they start as the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import attention_jax
from attention_jax.modules.registry import attention_entry, list_attention
from tests import helpers

# Mechanisms that `identity_init` cannot be asked of, and why.
EXCEPTIONS = {
    'sk': 'replaces a convolution',
    'split_attention': 'replaces a convolution',
    'isqrt_cov': 'a head',
    'danet_head': 'a head',
    'cross_layer_non_local': 'takes the maps of other layers',
}
# Whose defaults need larger maps than the last one of a small image.
ARGUMENTS = {
    'downsampled_self_attention': {'pool_size': 2},
    'pyramid_self_attention': {'images': 1, 'scales': (1, 2)},
}
ALL = [n for n in list_attention() if n not in EXCEPTIONS]


def alphas(variables):
    return [path for path in traverse_util.flatten_dict(variables, sep='/') if 'alpha' in path]


def with_plain_weights(name, attention, x):
    """A network with a mechanism, and the plain one: fresh, with the plain one's random arrays."""
    plain = attention_jax.create_model(name, num_classes=10)
    variables = helpers.random_variables(plain, x, dtype=np.float32)
    model = attention_jax.create_model(
        name,
        num_classes=10,
        attention=attention,
        attention_args=ARGUMENTS.get(attention),
        identity_init=True,
    )
    given = traverse_util.flatten_dict(variables, sep='/')

    @jax.jit
    def new():  # compiled for the mechanism's arrays alone
        fresh = traverse_util.flatten_dict(model.init(jax.random.key(0), x), sep='/')
        return {path: value for path, value in fresh.items() if path not in given}

    merged = {**given, **new()}
    return plain, variables, model, traverse_util.unflatten_dict(merged, sep='/')


@pytest.mark.parametrize(('attention', 'wrapped'), [('se', True), ('gc', False)])
def test_the_network_starts_as_the_plain_one(attention, wrapped):
    x = jnp.asarray(helpers.array((2, 16, 16, 3), dtype=np.float32))
    plain, variables, model, merged = with_plain_weights('tiny_resnet', attention, x)
    helpers.assert_close(model.apply(merged, x), plain.apply(variables, x), 1e-5)
    assert bool(alphas(merged['params'])) == wrapped


def test_alpha_learns_and_leads_to_the_mechanism():
    model = attention_jax.create_model('tiny_resnet', attention='se', identity_init=True)
    x = jnp.asarray(helpers.array((2, 16, 16, 3), dtype=np.float32))
    variables = helpers.random_variables(model, x, dtype=np.float32)
    grads = jax.jit(jax.grad(lambda v: model.apply(v, x).sum()))(variables)['params']
    assert np.abs(grads['stage1_block0']['attention_alpha']).max() > 0
    whole = {'params': dict(variables['params']), **{'batch_stats': variables['batch_stats']}}
    for stage in (1, 2, 3):
        block = dict(whole['params'][f'stage{stage}_block0'])
        block['attention_alpha'] = np.ones((1,), np.float32)
        whole['params'][f'stage{stage}_block0'] = block
    plainly = attention_jax.create_model('tiny_resnet', attention='se')
    helpers.assert_close(model.apply(whole, x), plainly.apply(whole, x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('attention', ALL)
def test_resnet50_with_any_mechanism_starts_as_resnet50(attention):
    x = jnp.asarray(helpers.array((1, 128, 128, 3), dtype=np.float32))
    plain, variables, model, merged = with_plain_weights('resnet50', attention, x)
    want = jax.jit(plain.apply)(variables, x)
    helpers.assert_close(jax.jit(model.apply)(merged, x), want, 1e-5, attention)


@pytest.mark.parametrize('attention', EXCEPTIONS)
def test_exceptions(attention):
    entry = attention_entry(attention)
    if entry.replaces_convolution:
        assert EXCEPTIONS[attention] == 'replaces a convolution'
    else:
        with pytest.raises(ValueError, match='no place inside a backbone'):
            attention_jax.create_model('resnet50', attention=attention, identity_init=True)
