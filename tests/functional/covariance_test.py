import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.functional import cost, covariance
from tests import helpers


def newton_schulz(s, iterations):
    """The recursion as it is written, every product done."""
    t = np.trace(s)
    y, z = s / t, np.eye(len(s))
    for _ in range(iterations):
        factor = (3 * np.eye(len(s)) - z @ y) / 2
        y, z = y @ factor, factor @ z
    return np.sqrt(t) * y


def test_covariance(x64):
    x = helpers.array((2, 3, 4, 5, 6)) + 1e4
    got = covariance.covariance(jnp.asarray(x))
    for i, j in np.ndindex(2, 3):
        want = np.cov(x[i, j].reshape(-1, 6), rowvar=False, bias=True)
        np.testing.assert_allclose(got[i, j], want, rtol=0, atol=1e-9)


def test_covariance_of_bfloat16_keeps_small_differences():
    x = (8 + helpers.array((1, 16, 16, 4)) / 8).astype(jnp.bfloat16)
    got = covariance.covariance(jnp.asarray(x))
    want = np.cov(x.reshape(-1, 4).astype(np.float64), rowvar=False, bias=True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-7)


def test_square_root_is_the_recursion_and_converges(x64):
    x = helpers.array((3, 6, 7, 5))
    s = covariance.covariance(jnp.asarray(x))
    for iterations in (1, 2, 3, 5):
        with cost.tally() as counts:
            r = covariance.square_root(s, iterations)
        assert counts['matmul'] == 3 * 5**3 * {1: 1, 2: 3, 3: 6, 5: 12}[iterations]
        for got, matrix in zip(r, s, strict=True):
            np.testing.assert_allclose(
                got, newton_schulz(np.asarray(matrix), iterations), atol=1e-12
            )
    r = covariance.square_root(s, 15)
    np.testing.assert_allclose(r @ r, s, atol=1e-8)


def test_square_root_of_nothing():
    """A zero matrix among others: 0, and no gradient, where the recursion alone gives NaN."""
    s = jnp.stack([jnp.zeros((4, 4)), jnp.eye(4)])
    for epsilon in (0.0, 1e-6):
        root = lambda s, e=epsilon: covariance.square_root(s, 5, epsilon=e)  # noqa: E731
        r, back = jax.vjp(root, s)
        (gradient,) = back(jnp.ones_like(r))
        np.testing.assert_array_equal(r[0], 0)
        assert np.isfinite(gradient).all()
        assert epsilon or not gradient[0].any()
        assert gradient[1].any()
    with pytest.raises(ValueError, match='iterations'):
        covariance.square_root(s, 0)


def test_triangles():
    s = jnp.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(covariance.triangle(s, 'upper'), [0, 1, 2, 4, 5, 8])
    np.testing.assert_array_equal(covariance.triangle(s[None], 'lower'), [[0, 3, 4, 6, 7, 8]])
    with pytest.raises(ValueError, match='triangle'):
        covariance.triangle(s, 'left')
