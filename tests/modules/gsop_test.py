import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import GlobalSecondOrderPooling
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'gsop': {'counts': (230_784, 154_337_280)}}


def bins(n, m):
    """PyTorch's adaptive mean of n positions over m bins, as a matrix."""
    matrix = np.zeros((m, n))
    for i in range(m):
        start, end = i * n // m, -(-(i + 1) * n // m)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def reading(module, train=False):
    """The equation in plain arrays, with the explicit centring matrices of the released code."""

    def read(xp, variables, x):
        params = variables['params']
        b, h, w = x.shape[:3]

        def affine(name, y):
            bias = params[name]['bias']
            return y @ params[name]['kernel'] + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

        def norm(name, y):
            return helpers.normalize(xp, variables, (name,), y, train)

        def rows(branch, s):
            s = norm(f'{branch}_row_norm', s.swapaxes(1, 2)).swapaxes(1, 2)
            conv = params[f'{branch}_row_conv']
            return xp.einsum('bij,ijm->bim', s, conv['kernel']) + conv['bias'][None]

        def gates(branch, v):
            return helpers.sigmoid(xp, affine(f'{branch}_expand', v.reshape(b, -1)))

        if module.mode != 'position':
            z = xp.maximum(x, 0)[:, :: module.strides, :: module.strides]
            z = xp.maximum(norm('channel_reduce_norm', affine('channel_reduce', z)), 0)
            z = z.reshape(b, -1, module.hidden)
            n = z.shape[1]
            centring = (np.eye(n) - np.ones((n, n)) / n) / n
            v = rows('channel', xp.einsum('bni,nm,bmj->bij', z, centring, z))
            if module.channel_activation == 'leaky_relu':
                v = xp.where(v > 0, v, 0.1 * v)
            a = x * gates('channel', v)[:, None, None, :]
        if module.mode != 'channel':
            (gh, gw), d = module.grid, module.hidden
            z = norm('position_reduce_norm', affine('position_reduce', xp.maximum(x, 0)))
            cells = xp.einsum('gh,vw,bhwd->bgvd', bins(h, gh), bins(w, gw), z).reshape(b, -1, d)
            n = gh * gw if module.position_centering == 'grid' else d
            centring = (np.eye(d) - np.ones((d, d)) / n) / n
            v = rows('position', xp.einsum('bic,ce,bje->bij', cells, centring, cells))
            plane = gates('position', xp.maximum(v, 0)).reshape(b, gh, gw)
            plane = xp.einsum('hg,wv,bgv->bhw', bins(gh, h), bins(gw, w), plane)
            p = xp.maximum(x * plane[..., None], 0)
        if module.mode == 'channel':
            return a
        if module.mode == 'position':
            return p
        if module.mode == 'fusion_avg':
            return a + p
        if module.mode == 'fusion_max':
            return xp.maximum(a, p)
        y = 0
        for name, part in (('concat_channel', a), ('concat_position', p)):
            conv = params[name]
            y = y + helpers.convolve(xp, part, conv['kernel'], groups=module.groups)
            y = y + conv['bias'][None, None, None]
        return norm('concat_norm', y)

    return read


@pytest.mark.parametrize(
    ('arguments', 'train'),
    [
        ({'strides': 2, 'channel_activation': 'leaky_relu'}, True),
        ({'mode': 'position', 'grid': (3, 8)}, True),
        ({'mode': 'fusion_max', 'grid': (2, 3), 'position_centering': 'channels'}, False),
        ({'mode': 'fusion_concat', 'grid': (2, 3), 'groups': 2, 'kernel_size': 3}, False),
    ],
)
def test_equation(x64, arguments, train):
    module = GlobalSecondOrderPooling(hidden=4, expansion=3, **arguments)
    helpers.check(module, reading(module, train), helpers.array((3, 5, 7, 8)), train=train)


def test_fusion_is_the_sum_of_its_parts(x64):
    fusion = GlobalSecondOrderPooling(hidden=4, mode='fusion_avg', grid=(3, 2))
    x = helpers.array((2, 4, 5, 8))
    variables = helpers.random_variables(fusion, x)
    parts = [fusion.clone(mode=mode).apply(variables, x) for mode in ('channel', 'position')]
    out, sown = fusion.apply(variables, x, mutable=['attention_maps'])
    np.testing.assert_allclose(out, sum(parts), atol=1e-14)
    shapes = {name: a.shape for name, a in sown['attention_maps'].items()}
    assert shapes == {'channel': (2, 8), 'position': (2, 4, 5)}
    # The larger of a signed and a non-negative number: nothing is left of a negative x.
    top = fusion.clone(mode='fusion_max').apply(variables, x)
    np.testing.assert_array_equal(top[x < 0], 0)
    assert (top[x > 0] > 0).all()


def test_channel_gate_follows_permuted_positions(x64):
    module = GlobalSecondOrderPooling(hidden=4)
    x = helpers.array((2, 4, 5, 8))
    variables = helpers.random_variables(module, x)
    order = np.random.default_rng(0).permutation(20)
    mixed = x.reshape(2, 20, 8)[:, order].reshape(x.shape)
    want = module.apply(variables, x).reshape(2, 20, 8)[:, order]
    np.testing.assert_allclose(module.apply(variables, mixed).reshape(2, 20, 8), want, atol=1e-12)


@pytest.mark.parametrize(('hidden', 'equal'), [(6, True), (5, False)])
def test_centrings_agree_where_the_cells_are_as_many_as_the_channels(x64, hidden, equal):
    module = GlobalSecondOrderPooling(hidden=hidden, mode='position', grid=(2, 3))
    x = helpers.array((2, 4, 5, 8))
    variables = helpers.random_variables(module, x)
    other = module.clone(position_centering='channels')
    difference = np.abs(module.apply(variables, x) - other.apply(variables, x)).max()
    assert (difference < 1e-12) == equal


def test_concat_windows_follow_the_groups():
    for channels, groups, window in ((256, 4, 11), (512, 8, 9), (1024, 16, 7), (2048, 32, 5)):
        module = GlobalSecondOrderPooling(mode='fusion_concat')
        x = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), x)['params']
        assert params['concat_channel']['kernel'].shape == (window, 1, channels // groups, channels)


@pytest.mark.parametrize(
    ('mode', 'parameters', 'macs'),
    [
        ('position', 66_368, 102_760_448 + 524_288 + 32_768),
        ('fusion_max', 297_152, 154_337_280 + 102_760_448 + 524_288 + 32_768),
        ('fusion_concat', 658_624, 257_654_784 + 2 * 3136 * 11 * 64 * 256),
    ],
)
def test_counts_of_the_other_modes(mode, parameters, macs):
    from attention_jax.models.costs import costs

    counts = costs(GlobalSecondOrderPooling(mode=mode), (1, 56, 56, 256))
    assert counts['parameters'] == parameters
    assert counts['macs'] + counts['matmul'] == macs


def test_starts_as_the_authors_do():
    x = jnp.zeros((1, 8, 8, 64))
    params = GlobalSecondOrderPooling().init(jax.random.key(0), x)['params']
    for name, want in (
        ('channel_reduce', (2 / 128) ** 0.5),
        ('channel_row_conv', 1 / (128 * 2**0.5)),
        ('channel_expand', (2 / 64) ** 0.5),
    ):
        np.testing.assert_allclose(params[name]['kernel'].std(), want, rtol=0.05)
    bound = 1 / np.sqrt(128)
    np.testing.assert_allclose(np.abs(params['channel_row_conv']['bias']).max(), bound, rtol=0.02)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'mode': '1'}, 'mode'),
        ({'hidden': 0}, 'hidden'),
        ({'strides': 0}, 'strides'),
        ({'expansion': 0}, 'expansion'),
        ({'grid': (0, 8)}, 'grid'),
        ({'grid': (8,)}, 'grid'),
        ({'channel_activation': 'relu7'}, 'channel_activation'),
        ({'position_centering': 'none'}, 'position_centering'),
        ({'mode': 'fusion_concat'}, 'groups None'),
        ({'mode': 'fusion_concat', 'groups': 3}, 'groups 3'),
        ({'mode': 'fusion_concat', 'groups': 0}, 'groups'),
        ({'mode': 'fusion_concat', 'groups': 2, 'kernel_size': 4}, 'kernel_size'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        GlobalSecondOrderPooling(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        GlobalSecondOrderPooling().init(jax.random.key(0), jnp.zeros((2, 8)))
    module, x = GlobalSecondOrderPooling(mode='fusion_concat'), jnp.zeros((1, 2, 2, 129))
    with pytest.raises(ValueError, match='groups 2 must be positive and divide the channels 129'):
        module.init(jax.random.key(0), x)
