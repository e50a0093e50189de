import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import IterativeSqrtCovariancePooling
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'isqrt_cov': {
        'counts': (66_048, 612_368_384),
        'too_small': (None, 'x must have more than one position'),
    }
}


def reading(iterations=5, vectorize=True, triangle='upper', epsilon=0.0, train=False):
    """The equation in plain arrays, with the explicit centring matrix; 0 iterations: covariance."""

    def read(xp, variables, x):
        z = x
        if variables.get('params'):
            z = helpers.normalize(
                xp, variables, ('reduce_norm',), z @ variables['params']['reduce']['kernel'], train
            )
            z = xp.maximum(z, 0)
        b, n, d = x.shape[0], x.shape[1] * x.shape[2], z.shape[-1]
        z = z.reshape(b, n, d)
        centring = (np.eye(n) - np.ones((n, n)) / n) / n
        s = xp.einsum('bni,nm,bmj->bij', z, centring, z)
        if iterations:
            t = xp.trace(s, axis1=1, axis2=2)[:, None, None] + epsilon
            y, eye = s / t, np.broadcast_to(np.eye(d), (b, d, d))
            z = eye
            for _ in range(iterations):
                factor = (3 * eye - z @ y) / 2
                y, z = y @ factor, factor @ z
            s = xp.sqrt(t) * y
        if not vectorize:
            return s
        entries = [
            s[:, i, j]
            for i in range(d)
            for j in (range(i, d) if triangle == 'upper' else range(i + 1))
        ]
        return xp.stack(entries, -1)

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({'hidden': 4}, {}),
        (
            {'hidden': 4, 'iterations': 3, 'triangle': 'lower', 'epsilon': 0.5},
            {'iterations': 3, 'triangle': 'lower', 'epsilon': 0.5},
        ),
        ({'hidden': None, 'iterations': 1}, {'iterations': 1}),
        (
            {'hidden': None, 'square_root': False, 'vectorize': False},
            {'iterations': 0, 'vectorize': False},
        ),
    ],
)
def test_equation(x64, arguments, options):
    module = IterativeSqrtCovariancePooling(**arguments)
    helpers.check(module, reading(**options), helpers.array((3, 4, 5, 6)))


def test_equation_in_training(x64):
    module = IterativeSqrtCovariancePooling(hidden=4)
    helpers.check(module, reading(train=True), helpers.array((3, 4, 5, 6)), train=True)


def test_properties(x64):
    """Blind to the order of positions; scaled by |a| with x, at any number of steps."""
    module = IterativeSqrtCovariancePooling(hidden=None, iterations=2)
    x = helpers.array((2, 4, 5, 6))
    order = np.random.default_rng(0).permutation(20)
    out = module.apply({}, x)
    mixed = x.reshape(2, 20, 6)[:, order].reshape(x.shape)
    np.testing.assert_allclose(module.apply({}, mixed), out, atol=1e-12)
    np.testing.assert_allclose(module.apply({}, -3 * x), 3 * out, atol=1e-12)
    matrix = module.clone(vectorize=False, iterations=15).apply({}, x)
    covariance = module.clone(vectorize=False, square_root=False).apply({}, x)
    np.testing.assert_allclose(matrix @ matrix, covariance, atol=1e-8)


def test_a_constant_map_is_zero():
    module = IterativeSqrtCovariancePooling(hidden=None)
    x = jnp.stack([jnp.zeros((4, 4, 3)), jnp.asarray(helpers.array((4, 4, 3), dtype=np.float32))])
    out, back = jax.vjp(lambda x: module.apply({}, x), x)
    (gradient,) = back(jnp.ones_like(out))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'hidden': 0}, 'hidden'),
        ({'iterations': 0}, 'iterations'),
        ({'triangle': 'left'}, 'triangle'),
        ({'epsilon': -1.0}, 'epsilon'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        IterativeSqrtCovariancePooling(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))


def test_bad_input_is_named():
    module = IterativeSqrtCovariancePooling(hidden=None)
    with pytest.raises(ValueError, match='x must have more than one position'):
        module.init(jax.random.key(0), jnp.zeros((2, 1, 1, 4)))
    out = module.clone(square_root=False).apply({}, jnp.ones((2, 1, 1, 4)))
    np.testing.assert_array_equal(out, 0)
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        module.init(jax.random.key(0), jnp.zeros((2, 4)))
