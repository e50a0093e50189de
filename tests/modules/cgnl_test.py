import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import CGNL, functional
from attention_jax.models import placement
from attention_jax.modules.registry import attention_entry
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'cgnl': {'counts': (102_912, 321_929_216)}}


def reading(groups=8, order=None, gamma=1e-4, scale=False, eps=1e-5, residual=True):
    """Group by group, in plain arrays; every scalar with every other would be the outer product."""

    def read(xp, variables, x):
        params = variables['params']
        b, h, w, c = x.shape
        rows = x.reshape(b, h * w, c)
        t, p, g = (rows @ params[name]['kernel'] for name in ('query', 'key', 'value'))
        r, kernel = t.shape[-1], params['out']['kernel'][0, 0]
        parts = []
        for group in range(groups):
            inner = slice(group * (r // groups), (group + 1) * (r // groups))
            outer = slice(group * (c // groups), (group + 1) * (c // groups))
            # One of the n c' scalars of a group a column.
            tt, pp, gg = (y[:, :, inner].reshape(b, -1) for y in (t, p, g))
            pairs = tt[:, :, None] * pp[:, None, :]
            if order is not None:
                taylor = [
                    (2 * gamma) ** o / math.factorial(o) * pairs**o for o in range(1, order + 1)
                ]
                pairs = math.exp(-2 * gamma) * (xp.ones_like(pairs) + sum(taylor, 0 * pairs))
            y = xp.einsum('bij,bj->bi', pairs, gg) / (tt.shape[1] ** 0.5 if scale else 1)
            z = y.reshape(b, h * w, r // groups) @ kernel[:, outer]
            z = z - z.mean((1, 2), keepdims=True)
            z = z / xp.sqrt((z**2).mean((1, 2), keepdims=True) + eps)
            norm = params['norm']
            parts.append(z * norm['scale'][None, None, outer] + norm['bias'][None, None, outer])
        z = xp.concatenate(parts, -1).reshape(x.shape)
        return x + z if residual else z

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {}),
        ({'groups': 2, 'scale': True, 'norm_eps': 1e-2}, {'groups': 2, 'scale': True, 'eps': 1e-2}),
        ({'groups': 1, 'hidden': 3, 'residual': False}, {'groups': 1, 'residual': False}),
        (
            {'mode': 'rbf', 'groups': 4, 'scale': True, 'gamma': 0.1, 'norm_eps': 1.0},
            {'order': 3, 'groups': 4, 'scale': True, 'gamma': 0.1, 'eps': 1.0},
        ),
        ({'mode': 'rbf', 'order': 0, 'gamma': 0.3}, {'order': 0, 'gamma': 0.3}),
    ],
)
def test_equation(x64, arguments, options):
    helpers.check(CGNL(**arguments), reading(**options), helpers.array((2, 3, 4, 16)))


def test_training_changes_nothing():
    module = CGNL()
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    apply = jax.jit(module.apply, static_argnames='train')
    np.testing.assert_array_equal(apply(variables, x, train=True), apply(variables, x))


def test_it_is_attention_between_the_scalars_of_a_group(x64):
    """One feature, no weighting: the core shared by the other mechanisms gives the same y."""
    module = CGNL(groups=4, residual=False)
    x = helpers.array((2, 3, 4, 16))
    variables = helpers.random_variables(module, x)
    params = variables['params']
    t, p, g = (
        np.moveaxis((x @ params[name]['kernel']).reshape(2, 12, 4, 2), 2, 1).reshape(2, 4, 24, 1)
        for name in ('query', 'key', 'value')
    )
    attend = jax.jit(functools.partial(functional.attend, weighting='none', scale=1.0))
    y = np.moveaxis(np.asarray(attend(t, p, g)).reshape(2, 4, 12, 2), 1, 2).reshape(2, 3, 4, 8)
    conv = jax.jit(functools.partial(functional.conv, groups=4))
    z = np.asarray(conv(y, params['out']['kernel'])).reshape(2, 12, 4, 4)
    z = (z - z.mean((1, 3), keepdims=True)) / np.sqrt(z.var((1, 3), keepdims=True) + 1e-5)
    z = z.reshape(2, 3, 4, 16) * params['norm']['scale'] + params['norm']['bias']
    helpers.assert_close(jax.jit(module.apply)(variables, x), z, 1e-10)


def test_permuted_positions_give_permuted_results():
    module = CGNL(mode='rbf', gamma=0.1)
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    order = np.random.default_rng(0).permutation(20)

    def shuffle(y):
        return y.reshape(2, 20, 16)[:, order].reshape(y.shape)

    apply = jax.jit(module.apply)
    helpers.assert_close(apply(variables, shuffle(x)), shuffle(apply(variables, x)), 1e-5)


def test_groups_do_not_mix_before_the_residual():
    """The first group's result feels only its own columns of the projections."""
    module = CGNL(groups=4)
    x = jnp.asarray(helpers.array((1, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    gradient = jax.jit(jax.grad(lambda p: (module.apply({'params': p}, x)[..., :4] ** 2).sum()))(
        variables['params']
    )
    for name in ('query', 'key', 'value'):
        felt = np.abs(gradient[name]['kernel']).max(0) > 0
        np.testing.assert_array_equal(felt, np.arange(8) < 2)


def test_fresh_it_is_the_identity_and_can_leave_it():
    module = CGNL()
    x = jnp.asarray(helpers.array((1, 3, 4, 16), dtype=np.float32))
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    gradient = jax.jit(jax.grad(lambda p: (module.apply({'params': p}, x) ** 2).sum()))(
        variables['params']
    )
    assert gradient['norm']['scale'].any()
    awake = module.clone(zero_init=False)
    assert np.abs(jax.jit(awake.init_with_output)(jax.random.key(0), x)[0] - x).max() > 1e-3


@pytest.mark.parametrize('mode', ['dot', 'rbf'])
def test_where_nothing_is_gathered_the_result_is_the_bias(mode):
    """Also its gradient is finite: t^0 is 1 for t = 0, and the variance is 0."""
    module = CGNL(mode=mode, residual=False)
    x = jnp.zeros((1, 2, 3, 16))
    variables = helpers.random_variables(module, x, dtype=np.float32)

    @jax.jit
    def run(variables, x):
        out, pull = jax.vjp(module.apply, variables, x)
        return out, pull(jnp.ones_like(out))

    out, gradients = run(variables, x)
    bias = variables['params']['norm']['bias']
    np.testing.assert_array_equal(out, np.broadcast_to(bias, x.shape))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('scale', [False, True])
def test_map(scale):
    x = helpers.array((2, 3, 4, 16), dtype=np.float32)
    module = CGNL(groups=4, scale=scale)
    params = helpers.random_variables(module, x, dtype=np.float32)['params']
    p, g = x @ params['key']['kernel'], x @ params['value']['kernel']
    sums = np.asarray([(p**o * g).sum((1, 2)).reshape(2, 4, 2).sum(-1) for o in range(4)])
    sums = sums / np.sqrt(24) if scale else sums
    (dot,) = attention_jax.attention_maps(module, {'params': params}, x).values()
    (rbf,) = attention_jax.attention_maps(module.clone(mode='rbf'), {'params': params}, x).values()
    np.testing.assert_allclose(dot, sums[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rbf, np.moveaxis(sums, 0, -1), rtol=1e-4, atol=1e-4)


def test_sums_of_bfloat16_are_float32():
    """40,000 products of 1: in bfloat16 their sum would stop at 256."""
    module = CGNL(hidden=1, groups=1)
    x = jnp.ones((1, 200, 200, 1), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    variables = jax.tree.map(jnp.ones_like, variables)
    (a,) = attention_jax.attention_maps(module, variables, x).values()
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a, 40_000)


def test_further_leading_axes_are_batch():
    """Statistics of the norm are an image's own, which Flax's default axes would not give."""
    module = CGNL()
    x = jnp.asarray(helpers.array((2, 3, 4, 5, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x[0], dtype=np.float32)
    apply = jax.jit(module.apply)
    one = np.stack([apply(variables, image) for image in x])
    helpers.assert_close(apply(variables, x), one, 1e-5)


def test_macs_of_the_series():
    x = jax.ShapeDtypeStruct((1, 56, 56, 256), jnp.float32)
    module = CGNL(mode='rbf')
    with functional.cost.tally() as counts:
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    assert counts['matmul'] == 4 * 2 * 56 * 56 * 128


def test_backbones_put_it_before_a_block():
    entry = attention_entry('cgnl')
    assert placement.default(entry, (3, 4, 6, 3), 'bottleneck') == 'before_block@3:5'


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'groups': 0}, 'groups'),
        ({'groups': 3, 'hidden': 6}, 'groups 3 .* channels 32'),
        ({'groups': 8, 'hidden': 12}, 'groups 8 .* hidden width 12'),
        ({'mode': 'gaussian'}, 'mode'),
        ({'mode': 'rbf', 'order': -1}, 'order'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        CGNL(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        CGNL().init(jax.random.key(0), jnp.zeros((2, 32)))
