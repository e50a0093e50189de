import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import BAM
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'bam': {'counts': (17_361, 27_354_112)}}


def dense(y, layer):
    return y @ layer['kernel'].reshape(y.shape[-1], -1) + layer['bias'].reshape(
        (1,) * (y.ndim - 1) + (-1,)
    )


def dilated(xp, u, layer, dilation):
    """The convolution as a sum over its taps."""
    k, (h, w) = layer['kernel'].shape[0], u.shape[1:3]
    p = (k - 1) // 2 * dilation
    u = xp.pad(u, ((0, 0), (p, p), (p, p), (0, 0)))
    y = 0
    for i in range(k):
        for j in range(k):
            rows, columns = i * dilation, j * dilation
            y = y + u[:, rows : rows + h, columns : columns + w] @ layer['kernel'][i, j]
    return y + layer['bias'][None, None, None]


def reading(train=False, dilation=4, combine='multiply', residual=True):
    """The equation in plain arrays; layers and norms are seen from the variables."""

    def read(xp, variables, x):
        channel, spatial = variables['params']['channel'], variables['params']['spatial']

        def norm(y, branch, name):
            if name not in variables['params'][branch]:
                return y
            return helpers.normalize(xp, variables, (branch, name), y, train)

        v = x.mean((1, 2))
        for i in range(sum(name.startswith('fc') for name in channel)):
            v = xp.maximum(norm(dense(v, channel[f'fc{i}']), 'channel', f'norm{i}'), 0)
        a_c = norm(dense(v, channel['out']), 'channel', 'out_norm')[:, None, None]

        u = dense(x, spatial['reduce'])
        if 'reduce_norm' in spatial:
            u = xp.maximum(norm(u, 'spatial', 'reduce_norm'), 0)
        for i in range(sum(name.startswith('conv') for name in spatial)):
            u = dilated(xp, u, spatial[f'conv{i}'], dilation)
            u = xp.maximum(norm(u, 'spatial', f'norm{i}'), 0)
        a_s = norm(dense(u, spatial['out']), 'spatial', 'out_norm')

        g = helpers.sigmoid(xp, a_c * a_s if combine == 'multiply' else a_c + a_s)
        return x * (1 + g) if residual else x * g

    return read


@pytest.mark.parametrize(
    ('arguments', 'options', 'train'),
    [
        ({'reduction': 2}, {}, False),
        ({'hidden': 3}, {}, True),
        (
            {'hidden': 3, 'channel_layers': 2, 'dilated_layers': 1, 'dilation': 2}
            | {'kernel_size': 5},
            {'dilation': 2},
            True,
        ),
        ({'hidden': 3, 'combine': 'add', 'residual': False, 'dilated_layers': 0},
         {'combine': 'add', 'residual': False}, False),
        ({'hidden': 3, 'combine': 'add', 'norm_position': 'output', 'dilated_layers': 1},
         {'combine': 'add'}, True),
    ],
)  # fmt: skip
def test_equation(x64, arguments, options, train):
    module = BAM(**arguments)
    helpers.check(module, reading(train, **options), helpers.array((4, 5, 3, 6)), train=train)


def test_a_silent_channel_branch_leaves_one_and_a_half():
    x = jnp.asarray(helpers.array((2, 4, 3, 32), dtype=np.float32))
    variables = BAM().init(jax.random.key(0), x)
    channel = variables['params']['channel']
    channel['out'] = jax.tree.map(jnp.zeros_like, channel['out'])
    np.testing.assert_array_equal(BAM().apply(variables, x), 1.5 * x)


def test_maps_make_the_gate():
    x = jnp.asarray(helpers.array((2, 4, 3, 32), dtype=np.float32))
    variables = helpers.random_variables(BAM(), x, dtype=np.float32)
    maps = attention_jax.attention_maps(BAM(), variables, x)
    assert {path: m.shape for path, m in maps.items()} == {
        'channel': (2, 32), 'spatial': (2, 4, 3), 'gate': (2, 4, 3, 32)
    }  # fmt: skip
    product = maps['channel'][:, None, None] * maps['spatial'][..., None]
    np.testing.assert_allclose(maps['gate'], helpers.sigmoid(np, product), rtol=1e-5)
    np.testing.assert_allclose(BAM().apply(variables, x), x * (1 + maps['gate']), rtol=1e-5)


def test_channels_may_be_permuted_with_the_parameters():
    x = jnp.asarray(helpers.array((2, 4, 5, 32), dtype=np.float32))
    module, order = BAM(), np.random.default_rng(0).permutation(32)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    want = module.apply(variables, x)[..., order]
    channel, spatial = variables['params']['channel'], variables['params']['spatial']
    channel['fc0']['kernel'] = channel['fc0']['kernel'][order]
    channel['out'] = jax.tree.map(lambda leaf: leaf[..., order], channel['out'])
    spatial['reduce']['kernel'] = spatial['reduce']['kernel'][:, :, order]
    np.testing.assert_allclose(module.apply(variables, x[..., order]), want, atol=1e-5)


def test_starts_as_the_authors_network():
    params = BAM(reduction=4).init(jax.random.key(0), jnp.zeros((2, 3, 3, 256)))['params']
    for branch in params.values():
        for name, layer in branch.items():
            assert not layer['bias'].any(), name
            if 'scale' in layer:
                np.testing.assert_array_equal(layer['scale'], 1)
    spatial = params['spatial']
    for name, fan_out in (('reduce', 64), ('conv0', 9 * 64), ('conv1', 9 * 64)):
        np.testing.assert_allclose(spatial[name]['kernel'].std(), np.sqrt(2 / fan_out), rtol=0.05)
    bound = np.abs(params['channel']['fc0']['kernel']).max()
    np.testing.assert_allclose(bound, 1 / 16, rtol=0.01)


def test_a_batch_of_one_cannot_be_normalised_in_training():
    x = jnp.ones((1, 4, 4, 32))
    variables = BAM().init(jax.random.key(0), x)
    assert np.isfinite(BAM().apply(variables, x)).all()
    with pytest.raises(ValueError, match='more than one value per channel'):
        BAM().apply(variables, x, train=True, mutable=['batch_stats'])


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'channel_layers': 0}, 'channel_layers'),
        ({'dilated_layers': -1}, 'dilated_layers'),
        ({'dilation': 0}, 'dilation'),
        ({'kernel_size': 4}, 'kernel_size'),
        ({'combine': 'product'}, 'combine'),
        ({'norm_position': 'both'}, 'norm_position'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        BAM(**arguments).init(jax.random.key(0), jnp.zeros((2, 3, 3, 32)))


def test_bad_input_is_named():
    for shape in ((2, 32), (2, 0, 3, 32)):
        with pytest.raises(ValueError, match='x must'):
            BAM().init(jax.random.key(0), jnp.zeros(shape))
