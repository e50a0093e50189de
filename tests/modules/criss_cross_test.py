import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import CrissCrossAttention, SelfAttention
from attention_jax.models import placement
from attention_jax.modules.registry import attention_entry
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'criss_cross': {'counts': (82_241, 716_111_872), 'zero_gradients': {'': ('key/bias',)}}}


def reading(recurrence, spatial_dims=2):
    """All pairs of positions, with the logits off the lines taken out."""

    def read(xp, variables, x):
        params = variables['params']
        shape, spatial = x.shape, x.shape[-1 - spatial_dims : -1]
        place = np.indices(spatial).reshape(spatial_dims, -1)
        on_a_line = ((place[:, :, None] != place[:, None, :]).sum(0) <= 1) * 1.0
        x = x.reshape(len(x), -1, x.shape[-1])

        def dense(name):
            y = x @ params[name]['kernel']
            return y + params[name]['bias'][None, None] if 'bias' in params[name] else y

        for _ in range(recurrence):
            q, k, v = map(dense, ('query', 'key', 'value'))
            p = xp.exp(q @ k.swapaxes(1, 2)) * on_a_line[None]
            x = x + params['gamma'][0] * (p / p.sum(-1, keepdims=True)) @ v
        return x.reshape(shape)

    return read


@pytest.mark.parametrize(
    ('arguments', 'shape'),
    [
        ({}, (2, 3, 4, 8)),
        ({'recurrence': 1, 'hidden': 3, 'use_bias': False}, (2, 4, 3, 5)),
        ({'recurrence': 3, 'reduction': 2, 'spatial_dims': 3}, (1, 2, 3, 4, 4)),
    ],
)
def test_equation(x64, arguments, shape):
    read = reading(arguments.get('recurrence', 2), arguments.get('spatial_dims', 2))
    helpers.check(CrissCrossAttention(**arguments), read, helpers.array(shape))


def test_training_changes_nothing():
    module = CrissCrossAttention()
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    apply = jax.jit(module.apply, static_argnames='train')
    np.testing.assert_array_equal(apply(variables, x, train=True), apply(variables, x))


@pytest.mark.parametrize('recurrence', [1, 2])
def test_two_passes_reach_every_position(recurrence):
    """Through one pass a position feels its lines only; through two, every position."""
    module = CrissCrossAttention(recurrence=recurrence)
    x = jnp.asarray(helpers.array((1, 3, 5, 8), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x)[0, 1, 3].sum()))(x)
    felt = np.abs(gradient[0]).max(-1) > 0
    on_a_line = np.zeros((3, 5), bool)
    on_a_line[1], on_a_line[:, 3] = True, True
    np.testing.assert_array_equal(felt, on_a_line | (recurrence == 2))


def test_passes_share_their_parameters():
    once, twice = CrissCrossAttention(recurrence=1), CrissCrossAttention(recurrence=2)
    x = jnp.asarray(helpers.array((2, 3, 4, 8), dtype=np.float32))
    variables = helpers.random_variables(once, x, dtype=np.float32)
    once, twice = (jax.jit(m.apply) for m in (once, twice))
    helpers.assert_close(twice(variables, x), once(variables, once(variables, x)), 1e-6)


@pytest.mark.parametrize('shape', [(2, 1, 6, 16), (2, 6, 1, 16)])
def test_on_one_line_it_is_self_attention(x64, shape):
    x = jnp.asarray(helpers.array(shape))
    module, other = CrissCrossAttention(recurrence=1), SelfAttention()
    variables = helpers.random_variables(module, x)
    got, want = (jax.jit(m.apply)(variables, x) for m in (module, other))
    helpers.assert_close(got, want, 1e-12)


def test_fresh_it_is_the_identity_and_can_leave_it():
    module = CrissCrossAttention()
    x = jnp.asarray(helpers.array((1, 3, 4, 16), dtype=np.float32))
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    gradient = jax.jit(jax.grad(lambda p: (module.apply({'params': p}, x) ** 2).sum()))(
        variables['params']
    )
    assert gradient['gamma'].any()
    assert not gradient['value']['kernel'].any()


def test_maps():
    x = helpers.array((2, 3, 4, 16), dtype=np.float32)
    module = CrissCrossAttention()
    variables = helpers.random_variables(module, x, dtype=np.float32)
    maps = attention_jax.attention_maps(module, variables, x)
    assert {k: v.shape for k, v in maps.items()} == dict.fromkeys(
        ('pass_0', 'pass_1'), (2, 3, 4, 7)
    )
    rows = attention_jax.attention_maps(module, variables, x, queries=(5, 0))['pass_1']
    np.testing.assert_allclose(rows, maps['pass_1'].reshape(2, 12, 7)[:, jnp.asarray([5, 0])])

    module = CrissCrossAttention(recurrence=1)
    (weights,) = attention_jax.attention_maps(module, variables, x).values()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[:, np.arange(3), :, np.arange(3)], 0)
    weights = np.asarray(weights)
    value = x @ variables['params']['value']['kernel'] + variables['params']['value']['bias']
    y = np.einsum('bijk,bkjc->bijc', weights[..., :3], value)
    y = y + np.einsum('bijl,bilc->bijc', weights[..., 3:], value)
    out = x + variables['params']['gamma'] * y
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), out, atol=1e-5)


def test_backbones_put_it_on_the_branch():
    entry = attention_entry('criss_cross')
    assert placement.default(entry, (3, 4, 6, 3), 'bottleneck') == 'branch'


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 17}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'recurrence': 0}, 'recurrence'),
        ({'spatial_dims': 1}, 'spatial_dims'),
        ({'spatial_dims': 4}, 'spatial_dims'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        CrissCrossAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 16)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., t, h, w, c\]'):
        CrissCrossAttention(spatial_dims=3).init(jax.random.key(0), jnp.zeros((2, 2, 32)))
