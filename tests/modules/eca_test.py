import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import EfficientChannelAttention
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'eca': {'counts': (3, 768)}}


def correlate(y, kernel, circular):
    """`v[i] = sum_j kernel[i, j] y[i + j - p]` as a matrix over channels; kernel `[c, k]`."""
    c, k = kernel.shape
    matrix = 0
    for j in range(k):
        offset = j - (k - 1) // 2
        sees = np.roll(np.eye(c), offset, 1) if circular else np.eye(c, k=offset)
        matrix = matrix + kernel[:, j, None] * sees
    return y @ matrix.T


def reading(circular=False, gate=helpers.sigmoid):
    """The equation in plain arrays; the mode is seen from the variables."""

    def read(xp, variables, x):
        params = variables['params']
        y = x.reshape(x.shape[0], -1, x.shape[-1]).mean(1)
        c = x.shape[-1]
        if 'conv2' in params:
            first, second = params['conv1'], params['conv2']
            u = xp.maximum(y[..., None] * first['kernel'] + first['bias'][None, None], 0)
            v = second['bias'][None] + sum(
                correlate(u[..., q], xp.stack([second['kernel'][:, q, 0]] * c), circular)
                for q in range(u.shape[-1])
            )
        elif 'kernel' in params:
            v = correlate(y, params['kernel'], circular)
        else:
            v = correlate(y, xp.stack([params['conv']['kernel'][:, 0, 0]] * c), circular)
            if 'bias' in params['conv']:
                v = v + params['conv']['bias'][None]
        return x * gate(xp, v)[:, None, None, :]

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {}),
        ({'kernel_size': 7, 'use_bias': True}, {}),
        ({'kernel_size': 1}, {}),
        ({'kernel_size': 15}, {}),  # wider than the channels
        (
            {'kernel_size': None, 'gate': 'hard_sigmoid'},
            {'gate': lambda xp, v: xp.clip(v + 3, 0, 6) / 6},
        ),
        ({'kernel_size': 5, 'padding': 'circular'}, {'circular': True}),
        ({'kernel_size': 25, 'padding': 'circular', 'use_bias': True}, {'circular': True}),
        ({'mode': 'per_channel', 'kernel_size': 5}, {}),
        ({'mode': 'mlp', 'hidden': 3}, {}),
        ({'mode': 'mlp', 'kernel_size': 5, 'padding': 'circular'}, {'circular': True}),
    ],
)
def test_equation(x64, arguments, options):
    module = EfficientChannelAttention(**arguments)
    helpers.check(module, reading(**options), helpers.array((2, 3, 4, 12)))


def test_training_changes_nothing():
    module = EfficientChannelAttention()
    x = jnp.asarray(helpers.array((2, 3, 4, 12), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    np.testing.assert_array_equal(
        module.apply(variables, x, train=True), module.apply(variables, x)
    )


@pytest.mark.parametrize(
    ('channels', 'arguments', 'size'),
    [
        (1, {}, 1),
        (7, {}, 1),
        (8, {}, 3),
        (127, {}, 3),
        (128, {}, 5),
        (2047, {}, 5),
        (2048, {}, 7),
        (7, {'min_kernel_size': 3}, 3),
        (256, {'gamma': 1.0}, 9),
        (256, {'beta': -1.0}, 3),
    ],
)
def test_kernel_rule(channels, arguments, size):
    module = EfficientChannelAttention(kernel_size=None, **arguments)
    x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    assert shapes['conv']['kernel'].shape == (size, 1, 1)


@pytest.mark.parametrize(('channels', 'width'), [(64, 8), (256, 32), (88, 16), (112, 16), (24, 8)])
def test_hidden_width_of_the_mlp(channels, width):
    module = EfficientChannelAttention(mode='mlp')
    x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    assert shapes['conv1']['kernel'].shape == (1, 1, width)
    assert shapes['conv2']['kernel'].shape == (3, width, 1)


@pytest.mark.parametrize('padding', ['zero', 'circular'])
def test_only_circular_padding_turns_with_the_channels(padding):
    module = EfficientChannelAttention(kernel_size=5, padding=padding)
    x = jnp.asarray(helpers.array((2, 3, 3, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    turned = module.apply(variables, jnp.roll(x, 3, -1))
    difference = np.abs(turned - jnp.roll(module.apply(variables, x), 3, -1)).max()
    assert (difference < 1e-6) == (padding == 'circular')


def test_gate_sees_positions_only_through_their_mean():
    module = EfficientChannelAttention()
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    mirrored = module.apply(variables, x[:, ::-1, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1, ::-1], module.apply(variables, x), rtol=1e-5)


@pytest.mark.parametrize(
    'arguments', [{'kernel_size': 9, 'use_bias': True}, {'mode': 'per_channel'}]
)
def test_initial_values_are_within_the_bound_of_the_window(arguments):
    module = EfficientChannelAttention(**arguments)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 512)))['params']
    bound = 1 / np.sqrt(arguments.get('kernel_size', 3))
    for leaf in jax.tree.leaves(params):
        assert np.abs(leaf).max() <= bound
        assert leaf.size < 9 or np.abs(leaf).max() > 0.6 * bound


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'kernel_size': 4}, 'kernel_size'),
        ({'kernel_size': -1}, 'kernel_size'),
        ({'kernel_size': None, 'gamma': 0.0}, 'gamma'),
        ({'kernel_size': None, 'min_kernel_size': 2}, 'min_kernel_size'),
        ({'kernel_size': 67, 'padding': 'circular'}, 'kernel_size'),
        ({'padding': 'same'}, 'padding'),
        ({'mode': 'dense'}, 'mode'),
        ({'mode': 'per_channel', 'padding': 'circular'}, 'padding'),
        ({'mode': 'per_channel', 'use_bias': True}, 'use_bias'),
        ({'mode': 'mlp', 'hidden': 0}, 'hidden'),
        ({'gate': 'softmax'}, 'gate'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    x = jnp.zeros((1, 2, 2, 32))
    with pytest.raises(ValueError, match=word):
        EfficientChannelAttention(**arguments).init(jax.random.key(0), x)


def test_widest_circular_window():
    x = jnp.zeros((1, 2, 2, 32))
    module = EfficientChannelAttention(kernel_size=65, padding='circular')
    assert module.init_with_output(jax.random.key(0), x)[0].shape == x.shape


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        EfficientChannelAttention().init(jax.random.key(0), jnp.zeros((2, 32)))
