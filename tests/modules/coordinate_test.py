import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import CoordinateAttention
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'coordinate': {'counts': (6_680, 458_752)}}


def hard_swish(xp, v):
    return v * xp.clip(v + 3, 0, 6) / 6


def hard_sigmoid(xp, v):
    return xp.clip(v + 3, 0, 6) / 6


def relu(xp, v):
    return xp.maximum(v, 0)


def unchanged(xp, v):
    return v


def reading(act=hard_swish, gate=helpers.sigmoid, residual=False, train=False):
    """The equation in plain arrays: one row and one column of means after the other."""

    def read(xp, variables, x):
        params = variables['params']

        def dense(v, name):
            v = v @ params[name]['kernel']
            return v + params[name]['bias'][None, None] if 'bias' in params[name] else v

        rows = xp.stack([x[:, i].mean(1) for i in range(x.shape[1])], 1)
        columns = xp.stack([x[:, :, j].mean(1) for j in range(x.shape[2])], 1)
        z = dense(xp.concatenate([rows, columns], 1), 'fc1')
        if 'norm' in params:
            z = helpers.normalize(xp, variables, ('norm',), z, train)
        z = act(xp, z)
        to_rows = gate(xp, dense(z[:, : x.shape[1]], 'fc_h'))
        to_columns = gate(xp, dense(z[:, x.shape[1] :], 'fc_w'))
        out = xp.einsum('bijc,bic,bjc->bijc', x, to_rows, to_columns)
        return out + x if residual else out

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {'train': True}),
        ({'normalization': None, 'residual': True}, {'residual': True}),
        (
            {'hidden': 3, 'use_bias': False, 'activation': 'relu', 'gate': 'hard_sigmoid'},
            {'act': relu, 'gate': hard_sigmoid},
        ),
        (
            {'reduction': 2, 'activation': 'identity', 'gate': 'identity'},
            {'act': unchanged, 'gate': unchanged, 'train': True},
        ),
    ],
)
def test_equation(x64, arguments, options):
    x = 2 * helpers.array((3, 5, 4, 16))
    read, train = reading(**options), options.get('train', False)
    helpers.check(CoordinateAttention(**arguments), read, x, train=train)


def widths(channels, **arguments):
    """Hidden widths for several numbers of channels."""
    module = CoordinateAttention(**arguments)
    found = []
    for c in channels:
        x = jax.ShapeDtypeStruct((1, 2, 2, c), jnp.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), x)['params']
        found.append(params['fc1']['kernel'].shape[1])
    return found


def test_hidden_width():
    channels = (16, 96, 256, 288, 320, 512)
    assert widths(channels) == [8, 8, 8, 9, 10, 16]
    timm = [max(8, (c + 96) // 192 * 8) for c in channels]
    assert widths(channels, reduction=24, hidden_divisor=8) == timm == [8, 8, 8, 16, 16, 24]
    assert widths(channels, reduction=16, min_hidden=1) == [1, 6, 16, 18, 20, 32]
    assert widths(channels, hidden=5) == [5] * 6


def test_rows_and_columns_share_their_statistics_once(x64):
    """The running mean takes one step, to the mean over rows and columns together."""
    x = jnp.asarray(helpers.array((2, 3, 7, 8)))
    module = CoordinateAttention(use_bias=False)
    variables = helpers.random_variables(module, x)
    _, changed = module.apply(variables, x, train=True, mutable=['batch_stats'])
    strips = np.concatenate([x.mean(2), x.mean(1)], 1).reshape(-1, 8)
    z = strips @ variables['params']['fc1']['kernel']
    old, new = variables['batch_stats']['norm'], changed['batch_stats']['norm']
    np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * z.mean(0), atol=1e-6)
    np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * z.var(0, ddof=1), atol=1e-6)


def test_a_turned_map_turns_the_output_if_the_gates_change_places():
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    module = CoordinateAttention()
    variables = helpers.random_variables(module, x, dtype=np.float32)
    params = variables['params']
    turned = {**variables, 'params': params | {'fc_h': params['fc_w'], 'fc_w': params['fc_h']}}
    want = module.apply(variables, x).swapaxes(1, 2)
    np.testing.assert_allclose(module.apply(turned, x.swapaxes(1, 2)), want, atol=1e-5)
    unturned = module.apply(variables, x.swapaxes(1, 2))
    assert np.abs(unturned - want).max() > 1e-2


def test_maps_are_the_gates():
    x = jnp.asarray(helpers.array((2, 4, 3, 16), dtype=np.float32))
    module = CoordinateAttention(residual=True)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    maps = attention_jax.attention_maps(module, variables, x)
    shapes = {path: m.shape for path, m in maps.items()}
    assert shapes == {'h': (2, 4, 16), 'w': (2, 3, 16), 'gate': (2, 4, 3, 16)}
    gate = maps['h'][:, :, None] * maps['w'][:, None]
    np.testing.assert_allclose(maps['gate'], gate, atol=1e-6)
    np.testing.assert_allclose(module.apply(variables, x), x * (1 + gate), atol=1e-5)


def test_one_set_of_weights_runs_on_every_size():
    small, large = jnp.ones((1, 1, 3, 32)), jnp.ones((1, 8, 9, 32))
    variables = CoordinateAttention().init(jax.random.key(0), small)
    assert CoordinateAttention().apply(variables, large).shape == large.shape


def test_starts_as_the_authors_network():
    x = jnp.zeros((1, 1, 1, 1024))
    params = CoordinateAttention(hidden=512).init(jax.random.key(0), x)['params']
    for name, outputs in (('fc1', 512), ('fc_h', 1024), ('fc_w', 1024)):
        np.testing.assert_allclose(params[name]['kernel'].std(), np.sqrt(2 / outputs), rtol=0.01)
        assert not params[name]['bias'].any()


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'min_hidden': 0}, 'min_hidden'),
        ({'hidden_divisor': 0}, 'hidden_divisor'),
        ({'normalization': 'layer'}, 'normalization'),
        ({'activation': 'swish'}, 'activation'),
        ({'gate': 'softmax'}, 'gate'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        CoordinateAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))


def test_bad_input_is_named():
    for shape in ((2, 32), (2, 3, 0, 32)):
        with pytest.raises(ValueError, match='x must'):
            CoordinateAttention().init(jax.random.key(0), jnp.zeros(shape))
