"""Batch normalisation: what each device runs, against its definition."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers

module = importlib.import_module('attention_jax.functional.normalization')
EPSILON = 1e-3


def definition(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    scale, bias = (v.reshape(mean.shape) for v in (scale, bias))
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias, mean.ravel(), var.ravel()


def forms(shift):
    """What a CPU runs, alone and as it is chosen, and what accelerators run."""
    return {
        'two passes': lambda *a: module._two_passes(*a, EPSILON),
        'chosen': lambda *a: module.batch_norm(*a, shift=shift, epsilon=EPSILON),
        'one pass': lambda *a: module._one_pass(*a, shift, EPSILON),
        'one pass about 0': lambda *a: module._one_pass(*a, None, EPSILON),
    }


@pytest.mark.parametrize('shape', [(2, 4, 3, 5), (6, 5)])
@pytest.mark.parametrize('name', forms(None))
def test_derivatives_of_any_order(name, shape, x64):
    """Values, forward mode, gradients by all results, the gradient of a gradient."""
    x, scale, bias, *more = (
        helpers.array(s, seed=i) for i, s in enumerate((shape, 5, 5, shape, 5, 5, shape, 5, 5, 5))
    )
    tangents, cotangents = tuple(more[:3]), tuple(more[3:6])
    function = forms(jnp.asarray(more[6]))[name]

    def penalty(function):
        def size(*a):
            gradients = jax.grad(lambda *a: jnp.sin(function(*a)[0]).sum(), (0, 1, 2))(*a)
            return sum(jnp.square(g).sum() for g in gradients)

        return size

    @jax.jit
    def results(*a):
        return [
            (
                jax.jvp(f, a, tangents),
                jax.vjp(f, *a)[1](cotangents),
                jax.grad(penalty(f), (0, 1, 2))(*a),
                jax.jvp(jax.grad(penalty(f)), a, tangents),
            )
            for f in (function, definition)
        ]

    ours, wanted = map(jax.tree.leaves, results(x, scale, bias))
    assert len(ours) == len(wanted) > 10
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_types(dtype):
    x = helpers.array((4, 4, 3, 2), dtype=np.float32)
    one, zero = jnp.ones(2), jnp.zeros(2)
    results = module.batch_norm(x.astype(dtype), one, zero, shift=one, epsilon=EPSILON)
    assert [r.dtype for r in results] == [jnp.float32] * 3
    for a, b in zip(
        results, definition(x.astype(dtype).astype(np.float32), one, zero), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_one_pass_keeps_its_digits_near_the_shift():
    x = 1e4 + helpers.array((64, 64, 2), dtype=np.float32)
    shift = jnp.full(2, 1e4)
    for form in ('two passes', 'one pass'):
        _, _, var = forms(shift)[form](jnp.asarray(x), jnp.ones(2), jnp.zeros(2))
        np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1)), rtol=1e-3)


def test_the_gradient_sums_twice():
    """Over x: for the scale and for the bias; the statistics' gradients are of the same sums."""
    x = jnp.zeros((2, 4, 4, 3))

    def loss(*a):
        return module._two_passes(*a, EPSILON)[0].sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, jnp.ones(3), jnp.zeros(3))
    text = lowered.as_text()
    reductions = [line for line in text.splitlines() if 'stablehlo.reduce(' in line]
    assert len(reductions) == 4, text  # the others: mean and variance
