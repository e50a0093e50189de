import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import SqueezeExcite
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'se': {'counts': (8_464, 8_192)}}


def reading(train=False, squeeze='average', activation=None, gate=helpers.sigmoid):
    """The equation in plain arrays."""

    def read(xp, variables, x):
        params = variables['params']
        positions = x.reshape(x.shape[0], -1, x.shape[-1])
        y = positions.mean(1)
        if squeeze == 'average_max':
            y = 0.5 * y + 0.5 * positions.max(1)
        z = y @ params['fc1']['kernel']
        if 'bias' in params['fc1']:
            z = z + params['fc1']['bias'][None]
        if 'norm' in params:
            z = helpers.normalize(xp, variables, ('norm',), z, train)
        z = xp.maximum(z, 0) if activation is None else activation(xp, z)
        z = z @ params['fc2']['kernel']
        if 'bias' in params['fc2']:
            z = z + params['fc2']['bias'][None]
        return x * gate(xp, z)[:, None, None, :]

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {}),
        ({'hidden': 5, 'use_bias': False}, {}),
        ({'hidden': 5, 'squeeze': 'average_max'}, {'squeeze': 'average_max'}),
        (
            {'hidden': 5, 'activation': 'silu'},
            {'activation': lambda xp, z: z * helpers.sigmoid(xp, z)},
        ),
        (
            {'hidden': 5, 'gate': 'hard_sigmoid'},
            {'gate': lambda xp, z: xp.clip(z + 3, 0, 6) / 6},
        ),
        ({'hidden': 5, 'normalization': 'batch'}, {}),
    ],
)
def test_equation(x64, arguments, options):
    helpers.check(SqueezeExcite(**arguments), reading(**options), helpers.array((3, 5, 4, 32)))


def test_equation_in_training(x64):
    module = SqueezeExcite(hidden=5, normalization='batch')
    helpers.check(module, reading(train=True), helpers.array((4, 5, 4, 16)), train=True)


@pytest.mark.parametrize(
    ('channels', 'floor', 'timm'), [(320, 20, 24), (608, 38, 40), (1056, 66, 64), (64, 4, 8)]
)
def test_hidden_width_conventions(channels, floor, timm):
    x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
    for arguments, width in (({}, floor), ({'hidden_divisor': 8}, timm)):
        module = SqueezeExcite(**arguments)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
        assert shapes['fc1']['kernel'].shape == (channels, width)


def test_fresh_gate_with_zero_last_layer_halves_its_input():
    x = jnp.asarray(helpers.array((2, 3, 3, 16), dtype=np.float32))
    variables = SqueezeExcite().init(jax.random.key(0), x)
    variables['params']['fc2'] = jax.tree.map(jnp.zeros_like, variables['params']['fc2'])
    np.testing.assert_array_equal(SqueezeExcite().apply(variables, x), x / 2)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'hidden_divisor': 0}, 'hidden_divisor'),
        ({'activation': 'relu7'}, 'activation'),
        ({'gate': 'softmax'}, 'gate'),
        ({'squeeze': 'max'}, 'squeeze'),
        ({'normalization': 'layer'}, 'normalization'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    x = jnp.zeros((1, 2, 2, 32))
    with pytest.raises(ValueError, match=word):
        SqueezeExcite(**arguments).init(jax.random.key(0), x)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        SqueezeExcite().init(jax.random.key(0), jnp.zeros((2, 32)))
    with pytest.raises(ValueError, match='floating'):
        SqueezeExcite().init(jax.random.key(0), jnp.zeros((2, 2, 2, 32), jnp.uint8))
    module = SqueezeExcite(normalization='batch')
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))
    with pytest.raises(ValueError, match='more than one value per channel'):
        module.apply(variables, jnp.zeros((1, 2, 2, 32)), train=True, mutable=['batch_stats'])
