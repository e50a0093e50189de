import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import CBAM, CBAMChannel, CBAMSpatial
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'cbam': {'counts': (8_564, 323_712)},
    'cbam_channel': {'counts': (8_464, 16_384)},
    'cbam_spatial': {'counts': (100, 307_328)},
}


def channel_half(xp, params, x, pool_types=('avg', 'max'), mode='full'):
    """The equation in plain arrays: x times the gate of its channels."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    pools = {
        'avg': rows.mean(1),
        'max': rows.max(1),
        'lp': xp.sqrt((rows**2).sum(1)),
        'lse': xp.log(xp.exp(rows).sum(1)),
    }

    def mlp(p):
        z = p @ params['fc1']['kernel']
        if 'bias' in params['fc1']:
            z = z + params['fc1']['bias'][None]
        z = xp.maximum(z, 0) @ params['fc2']['kernel']
        return z + params['fc2']['bias'][None] if 'bias' in params['fc2'] else z

    chosen = [pools[t] for t in pool_types]
    logits = mlp(sum(chosen) / len(chosen)) if mode == 'light' else sum(mlp(p) for p in chosen)
    return x * helpers.sigmoid(xp, logits)[:, None, None, :]


def spatial_half(xp, variables, path, x, train, pool_order='max_mean', mode='full'):
    """The equation in plain arrays: x times the gate of its positions."""
    params = variables['params']
    for key in path:
        params = params[key]
    z = {'max_mean': [x.max(-1), x.mean(-1)], 'mean_max': [x.mean(-1), x.max(-1)]}[pool_order]
    z = xp.stack(z, -1) if mode == 'full' else 0.5 * (z[0] + z[1])[..., None]
    kernel = params['conv']['kernel']
    k, (h, w) = kernel.shape[0], x.shape[1:3]
    p = (k - 1) // 2
    z = xp.pad(z, ((0, 0), (p, p), (p, p), (0, 0)))
    rows, columns = (np.arange(n)[:, None] + np.arange(k) for n in (h, w))
    windows = z[:, rows][:, :, :, columns]  # [b, h, k, w, k, q]
    y = xp.einsum('bhiwjq,ijqo->bhwo', windows, kernel)
    if 'bias' in params['conv']:
        y = y + params['conv']['bias'][None, None, None]
    if 'norm' in params:
        y = helpers.normalize(xp, variables, (*path, 'norm'), y, train)
    return x * helpers.sigmoid(xp, y)


def spatial_reading(train=False, **options):
    return lambda xp, variables, x: spatial_half(xp, variables, (), x, train, **options)


@pytest.mark.parametrize(
    'arguments',
    [
        {'reduction': 4},
        {'hidden': 5, 'mlp_bias': False},
        {'hidden': 5, 'pool_types': ('lse', 'lp')},
        {'hidden': 5, 'pool_types': ('max', 'lp', 'avg', 'lse'), 'mode': 'light'},
        {'hidden': 5, 'pool_types': ('avg',), 'mode': 'light'},
    ],
)
def test_channel_half(x64, arguments):
    options = {k: v for k, v in arguments.items() if k in ('pool_types', 'mode')}
    helpers.check(
        CBAMChannel(**arguments),
        lambda xp, variables, x: channel_half(xp, variables['params'], x, **options),
        helpers.array((3, 5, 4, 16)),
    )


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'kernel_size': 3, 'pool_order': 'mean_max', 'conv_bias': True, 'norm_eps': 1e-5},
        {'mode': 'light', 'conv_norm': False},
        {'kernel_size': 13, 'conv_norm': False, 'conv_bias': True},  # wider than the map
    ],
)
@pytest.mark.parametrize('train', [False, True])
def test_spatial_half(x64, arguments, train):
    options = {k: v for k, v in arguments.items() if k in ('pool_order', 'mode')}
    module = CBAMSpatial(**arguments)
    reading = spatial_reading(train, **options)
    helpers.check(module, reading, helpers.array((3, 5, 9, 6)), train=train)


@pytest.mark.parametrize(
    'arguments', [{}, {'residual': True, 'mode': 'light'}, {'spatial': False, 'residual': True}]
)
@pytest.mark.parametrize('train', [False, True])
def test_whole(x64, arguments, train):
    mode = arguments.get('mode', 'full')

    def reading(xp, variables, x):
        y = channel_half(xp, variables['params']['channel'], x, mode=mode)
        if arguments.get('spatial', True):
            y = spatial_half(xp, variables, ('spatial',), y, train, mode=mode)
        return y + x if arguments.get('residual') else y

    module = CBAM(reduction=4, **arguments)
    helpers.check(module, reading, helpers.array((3, 5, 4, 16)), train=train)


def test_the_norm_is_the_authors(x64):
    """One training step moves the running statistics by 1 %, the variance unbiased."""
    module, x = CBAMSpatial(conv_bias=False), helpers.array((2, 4, 4, 8))
    variables = module.init(jax.random.key(0), x)
    _, after = module.apply(variables, x, train=True, mutable=['batch_stats'])
    z = np.stack([x.max(-1), x.mean(-1)], -1)
    y = jax.lax.conv_general_dilated(
        z,
        variables['params']['conv']['kernel'].astype(float),
        (1, 1),
        ((3, 3), (3, 3)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    stats = after['batch_stats']['norm']
    np.testing.assert_allclose(stats['mean'], 0.01 * y.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats['var'], 0.99 + 0.01 * y.var(ddof=1), rtol=1e-5)


def test_fresh_gates():
    """The spatial gate starts as 0.5 and only its scale moves; the biases start at zero."""
    module = CBAM()
    x = jnp.asarray(helpers.array((2, 8, 8, 32), dtype=np.float32))
    variables = module.init(jax.random.key(0), x)
    params = variables['params']
    half = CBAM(spatial=False).apply({'params': params}, x) / 2
    np.testing.assert_allclose(module.apply(variables, x), half, rtol=1e-6)
    assert not params['channel']['fc1']['bias'].any()
    assert not params['channel']['fc2']['bias'].any()
    gradient = jax.grad(lambda p: (module.apply({**variables, 'params': p}, x) ** 2).sum())(params)
    assert not gradient['spatial']['conv']['kernel'].any()
    assert gradient['spatial']['norm']['scale'].any()
    ones = CBAM(norm_scale_init=1.0).init(jax.random.key(0), x)['params']['spatial']['norm']
    np.testing.assert_array_equal(ones['scale'], 1)

    kernel = CBAMSpatial(kernel_size=31).init(jax.random.key(1), x)['params']['conv']['kernel']
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 31**2), rtol=0.1)


def test_order_of_the_descriptor_swaps_the_kernel():
    x = jnp.asarray(helpers.array((2, 5, 7, 8), dtype=np.float32))
    first, other = CBAMSpatial(), CBAMSpatial(pool_order='mean_max')
    variables = helpers.random_variables(first, x, dtype=np.float32)
    params = variables['params']
    conv = {'kernel': params['conv']['kernel'][:, :, ::-1]}
    swapped = {**variables, 'params': {**params, 'conv': conv}}
    np.testing.assert_allclose(first.apply(variables, x), other.apply(swapped, x), atol=1e-5)
    assert np.abs(first.apply(variables, x) - other.apply(variables, x)).max() > 1e-2


def test_channels_may_be_permuted_with_the_parameters():
    x = jnp.asarray(helpers.array((2, 5, 4, 32), dtype=np.float32))
    module, order = CBAM(), np.random.default_rng(0).permutation(32)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    fc1, fc2 = (variables['params']['channel'][name] for name in ('fc1', 'fc2'))
    permuted = {
        'fc1': {'kernel': fc1['kernel'][order], 'bias': fc1['bias']},
        'fc2': {'kernel': fc2['kernel'][:, order], 'bias': fc2['bias'][order]},
    }
    want = module.apply(variables, x)[..., order]
    variables['params']['channel'] = permuted
    np.testing.assert_allclose(module.apply(variables, x[..., order]), want, atol=1e-5)


def test_equal_maxima_share_the_gradient():
    module = CBAMChannel(hidden=1, pool_types=('max',), mlp_bias=False)
    x = jnp.zeros((1, 2, 2, 1)).at[0, 0, 0, 0].set(1.0).at[0, 1, 1, 0].set(1.0)
    ones = {'kernel': jnp.ones((1, 1))}
    variables = {'params': {'fc1': ones, 'fc2': ones}}
    gradient = jax.grad(lambda x: module.apply(variables, x).sum())(x)[0, :, :, 0]
    gate = jax.nn.sigmoid(1.0)
    share = 2 * gate * (1 - gate) / 2  # sum of x, the gate's slope, half of it each
    np.testing.assert_allclose(gradient, [[gate + share, gate], [gate, gate + share]], rtol=1e-5)


@pytest.mark.parametrize('value', [0.0, 200.0, -200.0])
def test_pools_at_their_extremes(value):
    """A dead channel's `lp` has no slope, and `lse` does not overflow."""
    module = CBAMChannel(hidden=2, pool_types=('lp', 'lse'))
    x = jnp.asarray(helpers.array((1, 4, 4, 8), dtype=np.float32)).at[..., 0].set(value)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    variables = jax.tree.map(lambda v: 1e-3 * v, variables)
    out, gradient = jax.value_and_grad(lambda x: module.apply(variables, x).sum())(x)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()
    if value == 0.0:
        only_lp = module.clone(pool_types=('lp',))
        _, pullback = jax.vjp(lambda x: only_lp.apply(variables, x), x)
        cotangent = jnp.ones_like(x).at[..., 0].set(0)
        np.testing.assert_array_equal(pullback(cotangent)[0][..., 0], 0)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'pool_types': ()}, 'pool_types'),
        ({'pool_types': ('avg', 'avg')}, 'pool_types'),
        ({'pool_types': ('avg', 'median')}, 'pool_types'),
        ({'pool_types': 'avg'}, 'pool_types'),
        ({'kernel_size': 4}, 'kernel_size'),
        ({'kernel_size': 0}, 'kernel_size'),
        ({'pool_order': 'max'}, 'pool_order'),
        ({'mode': 'heavy'}, 'mode'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    x = jnp.zeros((1, 2, 2, 32))
    with pytest.raises(ValueError, match=word):
        CBAM(**arguments).init(jax.random.key(0), x)


@pytest.mark.parametrize('cls', [CBAM, CBAMChannel, CBAMSpatial])
def test_bad_input_is_named(cls):
    for shape in ((2, 32), (2, 0, 3, 32)):
        with pytest.raises(ValueError, match='x must'):
            cls().init(jax.random.key(0), jnp.zeros(shape))


def test_one_position_cannot_be_normalised_in_training():
    x = jnp.zeros((1, 1, 1, 32))
    variables = CBAM().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match='more than one value per channel'):
        CBAM().apply(variables, x, train=True, mutable=['batch_stats'])
