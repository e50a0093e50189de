import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import SimAM
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'simam': {'counts': (0, 0), 'too_small': (None, 'x must have more than one position')}}


def reading(e_lambda):
    """The equation in plain arrays."""

    def read(xp, variables, x):
        del variables
        n = x.shape[1] * x.shape[2]
        mean = x.reshape(x.shape[0], n, -1).mean(1)[:, None, None]
        d = (x - mean) ** 2
        v = d.reshape(x.shape[0], n, -1).sum(1)[:, None, None] / (n - 1)
        return x * helpers.sigmoid(xp, d / (4 * (v + e_lambda)) + 0.5)

    return read


@pytest.mark.parametrize('e_lambda', [1e-4, 0.1])
@pytest.mark.parametrize('shape', [(3, 5, 4, 6), (1, 2, 1, 1)])
def test_equation(x64, e_lambda, shape):
    helpers.check(SimAM(e_lambda=e_lambda), reading(e_lambda), helpers.array(shape))


def test_no_gate_is_below_a_constant_channels():
    """Far from 0, where squares have no digits for the variance."""
    x = 1e3 + jnp.asarray(helpers.array((2, 6, 5, 3)), jnp.float32).at[..., 0].set(7.0)
    _, sown = SimAM().apply({}, x, mutable=['attention_maps'])
    gates = np.asarray(sown['attention_maps']['map'])
    lowest = float(jax.nn.sigmoid(0.5))
    np.testing.assert_allclose(gates[..., 0], lowest, rtol=1e-5)
    assert (gates >= lowest - 1e-5).all()
    exact = np.asarray(x, np.float64)[..., 1]
    d = (exact - exact.mean((1, 2), keepdims=True)) ** 2
    z = d / (4 * (d.sum((1, 2), keepdims=True) / 29 + 1e-4)) + 0.5
    np.testing.assert_allclose(gates[..., 1], 1 / (1 + np.exp(-z)), atol=1e-3)  # float32 at 1e3
