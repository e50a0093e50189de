import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import PyramidSelfAttention
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'pyramid_self_attention': {
        'counts': (591_616, 5_611_382_784),
        'zero_gradients': {
            '': (
                'level_0/key/bias',
                'level_0/key_norm/bias',
                'level_1/key/bias',
                'level_1/key_norm/bias',
                'level_2/key/bias',
                'level_2/key_norm/bias',
                'level_3/key/bias',
                'level_3/key_norm/bias',
            )
        },
        'too_small': (
            'scales 2 must be positive and divide the pooled sides',
            'scales 2 must be positive and divide the pooled sides',
        ),
    }
}


def reading(scales, images, s=1, residual=False, train=False):
    """The equations in plain arrays, region by region."""

    def read(xp, variables, x):
        params = variables['params']
        b, h, w, c = x.shape
        h, w = h // s, w // s
        p = x.reshape(b, h, s, w, s, c).mean((2, 4))
        levels = []
        for i, r in enumerate(scales):
            name = f'level_{i}'
            q, k, v = (
                p @ params[name][part]['kernel'] + params[name][part]['bias'][None, None, None]
                for part in ('query', 'key', 'value')
            )
            q = helpers.normalize(xp, variables, (name, 'query_norm'), q, train)
            k = helpers.normalize(xp, variables, (name, 'key_norm'), k, train)
            hh, ww, width = h // r, w // images // r, w // images
            parts = {}
            for row in range(r):
                for column in range(r):
                    cut = [
                        (slice(None), slice(row * hh, (row + 1) * hh), slice(start, start + ww))
                        for start in (image * width + column * ww for image in range(images))
                    ]
                    qs, ks, vs = (
                        xp.concatenate([y[at].reshape(b, hh * ww, -1) for at in cut], 1)
                        for y in (q, k, v)
                    )
                    a = xp.exp(xp.einsum('bnd,bmd->bnm', qs, ks) * qs.shape[-1] ** -0.5)
                    y = xp.einsum('bnm,bmc->bnc', a / a.sum(-1, keepdims=True), vs)
                    for image in range(images):
                        one = y[:, image * hh * ww : (image + 1) * hh * ww]
                        parts[row, image, column] = one.reshape(b, hh, ww, c)
            rows = [
                xp.concatenate([parts[row, m, n] for m in range(images) for n in range(r)], 2)
                for row in range(r)
            ]
            levels.append(xp.concatenate(rows, 1))
        y = xp.concatenate(levels, -1) @ params['out']['kernel']
        y = xp.repeat(xp.repeat(y, s, 1), s, 2)
        return x + y if residual else y

    return read


@pytest.mark.parametrize(
    ('arguments', 'options', 'shape'),
    [
        ({'scales': (1, 2)}, {'scales': (1, 2), 'images': 2}, (2, 4, 8, 8)),
        (
            {'scales': (3,), 'images': 1, 'pool_size': 2, 'residual': True, 'chunk_size': 1},
            {'scales': (3,), 'images': 1, 's': 2, 'residual': True},
            (2, 6, 12, 8),
        ),
    ],
    ids=['two images', 'pooled'],
)
@pytest.mark.parametrize('train', [False, True])
def test_equation(x64, arguments, options, shape, train):
    module = PyramidSelfAttention(**arguments)
    helpers.check(module, reading(train=train, **options), helpers.array(shape), train=train)


def test_regions_are_apart():
    """A changed position is felt in its own region of every picture, and nowhere else."""
    x = jnp.asarray(helpers.array((1, 4, 8, 8), dtype=np.float32))
    module = PyramidSelfAttention(scales=(2,))
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    difference = module.apply(variables, x.at[0, 3, 1].add(1.0)) - module.apply(variables, x)
    felt = np.abs(difference[0]).max(-1) > 1e-6
    want = np.zeros((4, 8), bool)
    want[2:, 0:2] = want[2:, 4:6] = True
    np.testing.assert_array_equal(felt, want)


def test_maps():
    """Each level has its own; the rows asked for are those of the queries in their regions."""
    x = jnp.asarray(helpers.array((2, 4, 8, 8), dtype=np.float32))
    module = PyramidSelfAttention(scales=(1, 2))
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    maps = attention_jax.attention_maps(module, variables, x)
    assert {k: v.shape for k, v in maps.items()} == {
        'level_0': (2, 1, 1, 32, 32),
        'level_1': (2, 2, 2, 8, 8),
    }
    for y in maps.values():
        helpers.assert_close(y.sum(-1), np.ones(y.shape[:-1]), 1e-5)
    # Position (3, 5) is row 1, column 1 of the second picture's region (1, 0).
    rows = attention_jax.attention_maps(module, variables, x, queries=(3 * 8 + 5,))
    helpers.assert_close(rows['level_1'], maps['level_1'][:, 1, 0, 7:8], 1e-6)
    # With one region the order is row, column within a picture, picture.
    helpers.assert_close(
        rows['level_0'], maps['level_0'][:, 0, 0, 3 * 8 + 1 * 2 + 1][:, None], 1e-6
    )


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'images': 3}, 'images 3'),
        ({'images': 0}, 'images'),
        ({'scales': (3,)}, 'scales 3'),
        ({'scales': ()}, 'scales'),
        ({'scales': (1,), 'pool_size': 3}, 'pool_size 3'),
        ({'scales': (1,), 'pool_size': 0}, 'pool_size'),
        ({'scales': (1,), 'images': 8, 'pool_size': 4}, 'pool_size 4'),
        ({'reduction': 17}, 'reduction 17'),
        ({'hidden': 0}, 'hidden'),
        ({'chunk_size': 0}, 'chunk_size'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        PyramidSelfAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 8, 16, 8)))
