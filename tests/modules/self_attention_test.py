import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import SelfAttention
from attention_jax.functional import cost
from attention_jax.interop import torch
from attention_jax.modules.registry import attention_entry
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'self_attention': {'counts': (82_241, 3_089_235_968), 'zero_gradients': {'': ('key/bias',)}}
}

OFFICIAL = attention_entry('self_attention').variants['official']


def spectral_kernel(xp, kernel, u):
    """The kernel over its largest singular value by one step of the power iteration, and u'."""
    v = u @ kernel.T
    v = v / (xp.sqrt((v * v).sum()) + 1e-12)
    u = v @ kernel
    u = u / (xp.sqrt((u * u).sum()) + 1e-12)
    return kernel / (v @ kernel @ u.T), u


def reading(s=1):
    """The equations in plain arrays."""

    def read(xp, variables, x):
        params = variables['params']

        def dense(y, name):
            kernel = params[name]['kernel']
            if 'spectral' in variables:
                kernel, _ = spectral_kernel(xp, kernel, variables['spectral'][name]['u'])
            y = (y.reshape(-1, y.shape[-1]) @ kernel).reshape(*y.shape[:-1], -1)
            return y + params[name]['bias'][None, None, None] if 'bias' in params[name] else y

        def rows(y, s):
            b, h, w, f = y.shape
            y = y[:, : h // s * s, : w // s * s].reshape(b, h // s, s, w // s, s, f)
            return y.max((2, 4)).reshape(b, -1, f)

        q, k, v = rows(dense(x, 'query'), 1), rows(dense(x, 'key'), s), rows(dense(x, 'value'), s)
        a = xp.exp(xp.einsum('bnd,bmd->bnm', q, k))
        a = a / a.sum(-1, keepdims=True)
        y = xp.einsum('bnm,bme->bne', a, v).reshape(*x.shape[:3], -1)
        y = dense(y, 'out') if 'out' in params else y
        return x + params['gamma'][0] * y

    return read


@pytest.mark.parametrize(
    ('arguments', 's'),
    [
        ({}, 1),
        (OFFICIAL, 2),
        ({'hidden': 3, 'value_hidden': 5, 'output_projection': True, 'chunk_size': 7}, 1),
        ({'pool_size': 2, 'spectral_norm': True}, 2),
    ],
    ids=['article', 'official', 'widths', 'pooled'],
)
def test_equation(x64, arguments, s):
    helpers.check(SelfAttention(**arguments), reading(s), helpers.array((2, 5, 6, 16)))


def test_spectral_state(x64):
    """Evaluation uses the new state, training stores it; it converges to the spectral norm."""
    (path,) = [p for p in helpers.reference_cases('self_attention') if 'spectral' in p.stem]
    meta, arrays = helpers.load_case(path)
    state = helpers.prefixed(arrays, 'state/')
    module, variables, _ = torch.from_state_dict('self_attention', state, **meta['arguments'])
    assert set(variables) == {'params', 'spectral'}
    apply = jax.jit(lambda v: module.apply(v, arrays['input'], train=True, mutable=['spectral']))
    out, changed = apply(variables)
    helpers.assert_close(out, arrays['eval/output'])
    names = torch.to_state_dict('self_attention', changed, **meta['arguments'])
    after = helpers.prefixed(arrays, 'after/')
    assert set(names) == set(after)
    for name, want in after.items():
        helpers.assert_close(names[name], want, what=name)
    for _ in range(100):
        changed = apply({**variables, **changed})[1]
    kernel = variables['params']['value']['kernel']
    used, _ = spectral_kernel(np, kernel, np.asarray(changed['spectral']['value']['u']))
    helpers.assert_close(np.linalg.svd(used)[1].max(), 1.0, 1e-6)
    # The release lets the gradient through the iteration; the other reading differs.
    name = 'sn_conv_g/w'
    assert np.abs(arrays[f'eval/grad/{name}'] - arrays[f'eval/grad_stopped/{name}']).max() > 0.1


def test_state_stays_in_evaluation():
    x = jnp.asarray(helpers.array((1, 4, 4, 16), dtype=np.float32))
    module = SelfAttention(**OFFICIAL)
    variables = module.init(jax.random.key(0), x)
    _, changed = module.apply(variables, x, mutable=['spectral'])
    jax.tree.map(np.testing.assert_array_equal, changed['spectral'], variables['spectral'])


def test_only_the_gain_learns_at_first():
    x = jnp.asarray(helpers.array((2, 4, 4, 16), dtype=np.float32))
    variables = SelfAttention().init(jax.random.key(0), x)
    gradients = jax.grad(lambda p: jnp.square(SelfAttention().apply(p, x)).sum())(variables)
    sizes = jax.tree.map(lambda g: float(np.abs(g).max()), gradients['params'])
    assert sizes.pop('gamma') > 0
    assert not any(jax.tree.leaves(sizes))


def test_follows_a_permutation_of_the_positions():
    x = jnp.asarray(helpers.array((2, 4, 6, 16), dtype=np.float32))
    order = np.random.default_rng(0).permutation(24)
    module = SelfAttention()
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    shuffled = x.reshape(2, 24, 16)[:, order].reshape(x.shape)
    out = module.apply(variables, x).reshape(2, 24, 16)[:, order]
    helpers.assert_close(module.apply(variables, shuffled).reshape(out.shape), out, 1e-5)


def test_map():
    x = jnp.asarray(helpers.array((2, 4, 6, 16), dtype=np.float32))
    module = SelfAttention(pool_size=2)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    (weights,) = attention_jax.attention_maps(module, variables, x).values()
    assert weights.shape == (2, 24, 6)
    helpers.assert_close(weights.sum(-1), np.ones((2, 24)), 1e-5)
    (rows,) = attention_jax.attention_maps(module, variables, x, queries=(5, 0)).values()
    helpers.assert_close(rows, weights[:, jnp.asarray([5, 0])], 1e-6)


def test_counts_of_the_official_form():
    x = jax.ShapeDtypeStruct((1, 56, 56, 256), jnp.float32)
    with cost.tally() as counts:
        variables = jax.eval_shape(SelfAttention(**OFFICIAL).init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == 81_921
    assert counts['macs'] + counts['matmul'] == 650_280_960


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 17}, 'reduction 17'),
        ({'hidden': 0}, 'hidden'),
        ({'value_reduction': 2}, 'output_projection'),
        ({'value_reduction': 0}, 'value_reduction'),
        ({'value_hidden': 0}, 'value_hidden'),
        ({'pool_size': 0}, 'pool_size'),
        ({'pool_size': 3}, 'pool_size 3'),
        ({'chunk_size': 0}, 'chunk_size'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        SelfAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 4, 16)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        SelfAttention().init(jax.random.key(0), jnp.zeros((2, 16)))
