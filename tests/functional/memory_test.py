import jax
import jax.numpy as jnp
import pytest

from attention_jax import functional
from tests import helpers


def plain(x, key, value, epsilon):
    weights = jax.nn.softmax(jnp.einsum('bhwc,cgk->bhwgk', x, key), axis=(1, 2))
    weights = weights / (epsilon + weights.sum(-1, keepdims=True))
    return jnp.einsum('bhwgk,gko->bhwo', weights, value)


@pytest.mark.parametrize('epsilon', [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_equation(x64, epsilon):
    shapes = ((2, 3, 5, 4), (4, 2, 7), (2, 7, 6))
    x, key, value = (helpers.array(shape, i) for i, shape in enumerate(shapes))
    cotangent = helpers.array((2, 3, 5, 6), 9)
    results = []
    for read in (functional.read_memory, plain):
        out, pullback = jax.vjp(lambda *a, read=read: read(*a, epsilon), x, key, value)
        results.append((out, *pullback(cotangent)))
    for got, want in zip(*results, strict=True):
        helpers.assert_close(got, want, 1e-12)


def test_large_logits_and_types():
    x = jnp.full((1, 2, 2, 4), 1e3, jnp.bfloat16).at[0, 0, 0].set(-1e3)
    key, value = jnp.ones((4, 2, 3)), jnp.ones((2, 3, 5))
    out, pullback = jax.vjp(lambda *a: functional.read_memory(*a, 1e-9), x, key, value)
    assert out.dtype == x.dtype
    assert jnp.isfinite(out).all()
    assert all(jnp.isfinite(g).all() for g in pullback(jnp.ones_like(out)))
    # A position of no weight reads nothing, the others read all of each of the two memories.
    assert out[0, 0, 0, 0] == 0
    assert out[0, 1, 1, 0] == 2
