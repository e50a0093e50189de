import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import CBAMSpatial, TripletAttention
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'triplet': {'counts': (300, 3_117_184)}}

# What each plane's gate pools, and its two axes, of x [b, h, w, c].
PLANES = {'cw': (1, (3, 2)), 'hc': (2, (1, 3)), 'hw': (3, (1, 2))}


def reading(train=False):
    """The equation in plain arrays: three gated copies of x, averaged."""

    def gate(xp, variables, x, name):
        pooled, plane = PLANES[name]
        x = xp.transpose(x, (0, *plane, pooled))  # the pooled axis last
        z = xp.stack([x.max(-1), x.mean(-1)], -1)
        kernel = variables['params'][name]['conv']['kernel']
        k, (m, n) = kernel.shape[0], z.shape[1:3]
        p = (k - 1) // 2
        z = xp.pad(z, ((0, 0), (p, p), (p, p), (0, 0)))
        rows, columns = (np.arange(length)[:, None] + np.arange(k) for length in (m, n))
        windows = z[:, rows][:, :, :, columns]  # [b, m, k, n, k, 2]
        y = xp.einsum('bminjq,ijqo->bmno', windows, kernel)
        y = helpers.normalize(xp, variables, (name, 'norm'), y, train)
        # Back to the order of x; the pooled axis has length 1.
        return xp.transpose(helpers.sigmoid(xp, y), np.argsort((0, *plane, pooled)))

    def read(xp, variables, x):
        copies = [x * gate(xp, variables, x, name) for name in variables['params']]
        return sum(copies) / len(copies)

    return read


@pytest.mark.parametrize(
    ('arguments', 'train'),
    [({}, False), ({'kernel_size': 3}, True), ({'kernel_size': 3, 'spatial': False}, True)],
)
def test_equation(x64, arguments, train):
    x = helpers.array((3, 5, 4, 6))  # smaller than the window of 7
    helpers.check(TripletAttention(**arguments), reading(train), x, train=train)


def test_one_gate_is_that_of_cbam(x64):
    """With the other two gates at 1, a third of x (2 + g) is left."""
    x = jnp.asarray(helpers.array((2, 5, 4, 6)))
    variables = helpers.random_variables(TripletAttention(), x)
    for name in ('cw', 'hc'):
        variables['params'][name]['norm'] = {'scale': np.zeros(1), 'bias': np.full(1, 60.0)}
    alone = {collection: tree['hw'] for collection, tree in variables.items()}
    gated = CBAMSpatial().apply(alone, x)
    helpers.assert_close(TripletAttention().apply(variables, x), (2 * x + gated) / 3)


def test_the_map_may_be_rotated_with_the_parameters(x64):
    """Height and channels change places: so do the planes cw and hw, and hc is transposed."""
    x = jnp.asarray(helpers.array((2, 5, 4, 6)))
    module = TripletAttention(kernel_size=3)
    variables = helpers.random_variables(module, x)
    want = module.apply(variables, x).swapaxes(1, 3)
    rotated = {
        collection: {'cw': tree['hw'], 'hc': tree['hc'], 'hw': tree['cw']}
        for collection, tree in variables.items()
    }
    hc = rotated['params']['hc']
    hc = {**hc, 'conv': {'kernel': hc['conv']['kernel'].swapaxes(0, 1)}}
    rotated['params']['hc'] = hc
    helpers.assert_close(module.apply(rotated, x.swapaxes(1, 3)), want)


def test_the_order_of_the_channels_matters():
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    module, order = TripletAttention(), np.random.default_rng(0).permutation(16)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    turned = module.apply(variables, x[..., order])
    assert np.abs(turned - module.apply(variables, x)[..., order]).max() > 1e-2


def test_maps_are_the_gates():
    x = jnp.asarray(helpers.array((2, 4, 3, 6), dtype=np.float32))
    variables = helpers.random_variables(TripletAttention(), x, dtype=np.float32)
    maps = attention_jax.attention_maps(TripletAttention(), variables, x)
    assert {path: m.shape for path, m in maps.items()} == {
        'cw': (2, 6, 3), 'hc': (2, 4, 6), 'hw': (2, 4, 3)
    }  # fmt: skip
    cw, hc, hw = maps['cw'], maps['hc'], maps['hw']
    gate = cw.swapaxes(1, 2)[:, None] + hc[:, :, None] + hw[..., None]
    np.testing.assert_allclose(TripletAttention().apply(variables, x), x * gate / 3, atol=1e-5)


def test_one_set_of_weights_runs_on_every_size():
    small, large = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 8, 9, 16))
    variables = TripletAttention().init(jax.random.key(0), small)
    assert TripletAttention().apply(variables, large).shape == large.shape
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == 300


@pytest.mark.parametrize(('arguments', 'scale'), [({}, 0), ({'norm_scale_init': 1.0}, 1)])
def test_scales_start_as_the_authors_networks(arguments, scale):
    x = jnp.zeros((1, 4, 4, 8))
    params = TripletAttention(**arguments).init(jax.random.key(0), x)['params']
    assert {name: float(plane['norm']['scale'][0]) for name, plane in params.items()} == {
        'cw': 1, 'hc': 1, 'hw': scale
    }  # fmt: skip
    kernels = np.stack([plane['conv']['kernel'] for plane in params.values()])
    np.testing.assert_allclose(kernels.std(), np.sqrt(2 / 49), rtol=0.15)


@pytest.mark.parametrize('size', [0, -1, 4])
def test_bad_arguments_are_named(size):
    with pytest.raises(ValueError, match='kernel_size'):
        TripletAttention(kernel_size=size).init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


def test_bad_input_is_named():
    for shape in ((2, 32), (2, 3, 0, 32)):
        with pytest.raises(ValueError, match='x must'):
            TripletAttention().init(jax.random.key(0), jnp.zeros(shape))
