import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import DownsampledSelfAttention
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'downsampled_self_attention': {
        'counts': (82_240, 4_705_568),
        'zero_gradients': {'': ('key/bias',)},
        'too_small': (
            'pool_size 8 must be positive and divide the sides of x',
            'pool_size 8 must be positive and divide the sides of x',
        ),
    }
}


def taps(length, s):
    """Bilinear enlargement by s as a matrix [length * s, length]; the border is repeated."""
    matrix = np.zeros((length * s, length))
    for i in range(length * s):
        at = min(max((i + 0.5) / s - 0.5, 0), length - 1)
        low = int(at)
        high = min(low + 1, length - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix


def nearest(length, s):
    return np.kron(np.eye(length), np.ones((s, 1)))


def reading(s, enlarge=nearest, scale=None, residual=True):
    """The equations in plain arrays."""

    def read(xp, variables, x):
        params = variables['params']
        b, h, w, c = x.shape
        p = x.reshape(b, h // s, s, w // s, s, c).mean((2, 4)).reshape(b, -1, c)

        def dense(name):
            y = p @ params[name]['kernel']
            return y + params[name]['bias'][None, None] if 'bias' in params[name] else y

        q, k, v = dense('query'), dense('key'), dense('value')
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        a = xp.exp(factor * xp.einsum('bnd,bmd->bnm', q, k))
        y = xp.einsum('bnm,bmc->bnc', a / a.sum(-1, keepdims=True), v)
        y = y.reshape(b, h // s, w // s, c)
        y = xp.einsum('ih,jw,bhwc->bijc', enlarge(h // s, s), enlarge(w // s, s), y)
        y = y * params['gamma'][0] if 'gamma' in params else y
        return x + y if residual else y

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {'s': 8}),
        ({'pool_size': 2, 'resize': 'bilinear'}, {'s': 2, 'enlarge': taps}),
        (
            {'pool_size': 4, 'use_gamma': True, 'use_bias': False, 'scale': 'input'},
            {'s': 4, 'scale': 0.25},
        ),
        (
            {'pool_size': 1, 'residual': False, 'scale': None, 'chunk_size': 9},
            {'s': 1, 'scale': 1, 'residual': False},
        ),
    ],
)
def test_equation(x64, arguments, options):
    shape = (2, 8, 16, 16)
    helpers.check(DownsampledSelfAttention(**arguments), reading(**options), helpers.array(shape))


def test_weights_hold_a_gain_that_is_not_used():
    """A strict conversion takes the released names; their gain has a place with `use_gamma`."""
    path = helpers.REFERENCE / 'downsampled_self_attention' / 'seed.npz'
    meta, arrays = helpers.load_case(path)
    state = helpers.prefixed(arrays, 'state/')
    name, arguments = meta['mechanism'], meta['arguments']
    _, variables, report = torch.from_state_dict(name, state, **arguments)
    assert 'gamma' not in variables['params']
    assert (report.ignored, report.unused) == (('gamma',), ())
    _, variables, report = torch.from_state_dict(name, state, use_gamma=True, **arguments)
    np.testing.assert_array_equal(variables['params']['gamma'], state['gamma'])
    assert report.ignored == ()
    with pytest.raises(ValueError, match=r'unused: gain'):
        torch.from_state_dict(name, {**state, 'gain': state['gamma']}, **arguments)


def test_map_is_that_of_the_cells():
    x = jnp.asarray(helpers.array((2, 8, 16, 16), dtype=np.float32))
    module = DownsampledSelfAttention(pool_size=4)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    (weights,) = attention_jax.attention_maps(module, variables, x).values()
    assert weights.shape == (2, 8, 8)
    (rows,) = attention_jax.attention_maps(module, variables, x, queries=(6,)).values()
    helpers.assert_close(rows, weights[:, 6:7], 1e-6)


def test_gain_makes_it_start_as_the_identity():
    x = jnp.asarray(helpers.array((1, 8, 8, 16), dtype=np.float32))
    module = DownsampledSelfAttention(use_gamma=True)
    np.testing.assert_array_equal(module.apply(module.init(jax.random.key(0), x), x), x)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'pool_size': 3}, 'pool_size 3'),
        ({'pool_size': 0}, 'pool_size'),
        ({'reduction': 17}, 'reduction 17'),
        ({'hidden': 0}, 'hidden'),
        ({'scale': 'width'}, 'scale'),
        ({'resize': 'cubic'}, 'resize'),
        ({'chunk_size': 0}, 'chunk_size'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        DownsampledSelfAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        DownsampledSelfAttention().init(jax.random.key(0), jnp.zeros((8, 16)))
