import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import NonLocal
from attention_jax.functional import cost
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'non_local': {
        'counts': (132_224, 886_308_864),
        'too_small': ('pool_size 2 leaves nothing of x', 'pool_size 2 leaves nothing of x'),
    }
}


def max_pool(xp, x, s, spatial_dims):
    """Windows of s by s (s on a line), what is left over dropped; frames are never pooled."""
    for axis in range(x.ndim - 1 - min(spatial_dims, 2), x.ndim - 1):
        length = x.shape[axis] // s
        x = xp.moveaxis(x, axis, 0)[: length * s]
        x = xp.moveaxis(x.reshape(length, s, *x.shape[1:]).max(1), 0, axis)
    return x


def reading(
    mode='embedded_gaussian', s=2, position='before', dims=2, scale=None, group=None, train=False
):
    """The equations in plain arrays, with the tensor of pairs; `scale` None is the default's."""

    def read(xp, variables, x):
        params = variables['params']

        def dense(y, name):
            layer = params[name]
            y = (y.reshape(-1, y.shape[-1]) @ layer['kernel']).reshape(*y.shape[:-1], -1)
            return y + layer['bias'].reshape((1,) * (y.ndim - 1) + (-1,)) if 'bias' in layer else y

        def pool(y):
            return max_pool(xp, y, s, dims)

        def rows(y):
            return y.reshape(-1, int(np.prod(y.shape[-1 - dims : -1])), y.shape[-1])

        shape = x.shape
        if group:
            x = x.reshape(x.shape[0] * x.shape[1] // group, group, *x.shape[2:])
        if position == 'before':
            v = dense(pool(x), 'value')
            k = pool(x) if mode == 'gaussian' else dense(pool(x), 'key')
        else:
            v = pool(dense(x, 'value'))
            k = pool(x if mode == 'gaussian' else dense(x, 'key'))
        q = rows(x if mode == 'gaussian' else dense(x, 'query'))
        k, v = rows(k), rows(v)
        d, m = q.shape[-1], k.shape[1]
        if mode == 'concatenation':
            n = q.shape[1]
            pairs = (len(q), n, m, d)
            left = xp.broadcast_to(q[:, :, None], pairs)
            right = xp.broadcast_to(k[:, None], pairs)
            logits = xp.concatenate([left, right], -1) @ params['similarity']['kernel'][:, 0]
            a = xp.where(logits > 0, logits, 0) / m
        else:
            logits = xp.einsum('bnd,bmd->bnm', q, k)
            if mode == 'dot_product':
                a = logits / m
            else:
                default = 1.0 if mode == 'gaussian' else d**-0.5
                logits = logits * (default if scale is None else scale)
                a = xp.exp(logits - logits.max(-1, keepdims=True))
                a = a / a.sum(-1, keepdims=True)
        z = dense(xp.einsum('bnm,bme->bne', a, v), 'out').reshape(shape)
        if 'norm' in params:
            z = helpers.normalize(xp, variables, ('norm',), z, train)
        return x.reshape(shape) + z

    return read


MAP = (2, 5, 6, 8)


@pytest.mark.parametrize('mode', ['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation'])
@pytest.mark.parametrize('position', ['before', 'after'])
def test_modes(x64, mode, position):
    module = NonLocal(mode=mode, pool_position=position)
    helpers.check(module, reading(mode, position=position), helpers.array(MAP))


@pytest.mark.parametrize(
    ('arguments', 'options', 'shape'),
    [
        ({'spatial_dims': 1}, {'dims': 1}, (2, 9, 8)),
        ({'spatial_dims': 3}, {'dims': 3}, (2, 4, 3, 4, 8)),
        ({'spatial_dims': 3, 'group_size': 2}, {'dims': 3, 'group': 2}, (2, 4, 3, 4, 8)),
        ({'pool_size': 1, 'scale': None}, {'s': 1, 'scale': 1.0}, MAP),
        ({'pool_size': 3, 'scale': 'input'}, {'s': 3, 'scale': 8**-0.5}, MAP),
        ({'scale': 0.3, 'hidden': 3, 'chunk_size': 7}, {'scale': 0.3}, MAP),
        ({'use_bias': False}, {}, MAP),
        ({'use_bias': False, 'output_bias': True, 'normalization': None}, {}, MAP),
        ({'reduction': 100}, {}, MAP),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, dict) else None,
)
def test_arguments(x64, arguments, options, shape):
    helpers.check(NonLocal(**arguments), reading(**options), helpers.array(shape))


def test_equation_in_training(x64):
    helpers.check(NonLocal(), reading(train=True), helpers.array(MAP), train=True)


@pytest.mark.parametrize('normalization', ['batch', None])
def test_starts_as_the_identity(normalization):
    x = jnp.asarray(helpers.array((2, 4, 4, 16), dtype=np.float32))
    module = NonLocal(normalization=normalization)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(variables, x), x)
    np.testing.assert_array_equal(
        module.clone(residual=False).apply(variables, x), jnp.zeros_like(x)
    )
    loose = module.clone(zero_init=False)
    assert np.abs(loose.apply(loose.init(jax.random.key(0), x), x) - x).max() > 0


@pytest.mark.parametrize('mode', ['embedded_gaussian', 'dot_product', 'concatenation'])
def test_map(mode):
    """The map takes v to y, and its rows come alone when they are asked for."""
    x = jnp.asarray(helpers.array((2, 4, 6, 8), dtype=np.float32))
    module = NonLocal(mode=mode, normalization=None, residual=False)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    out, sown = module.apply(variables, x, mutable=['attention_maps'])
    weights = sown['attention_maps']['map']
    assert weights.shape == (2, 24, 6)
    params = variables['params']
    pooled = max_pool(jnp, x, 2, 2).reshape(2, 6, 8)
    v = pooled @ params['value']['kernel'] + params['value']['bias'][None, None]
    want = weights @ v @ params['out']['kernel'] + params['out']['bias'][None, None]
    helpers.assert_close(out.reshape(2, 24, 8), want, 1e-5)
    (rows,) = attention_jax.attention_maps(module, variables, x, queries=(5, 0)).values()
    np.testing.assert_allclose(rows, weights[:, jnp.asarray([5, 0])], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ('arguments', 'parameters', 'millions'),
    [
        ({}, 132_224, 886),
        ({'pool_size': 1}, 132_224, 2929),
        ({'pool_position': 'after'}, 132_224, 1040),
        ({'mode': 'dot_product'}, 132_224, 321),
        ({'mode': 'concatenation'}, 132_224 + 256, 258),
        ({'mode': 'gaussian'}, 132_224 - 2 * (256 * 128 + 128), None),
    ],
)
def test_counts(arguments, parameters, millions):
    x = jax.ShapeDtypeStruct((1, 56, 56, 256), jnp.float32)
    with cost.tally() as counts:
        variables = jax.eval_shape(NonLocal(**arguments).init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == parameters
    if millions:
        assert round((counts['macs'] + counts['matmul']) / 1e6) == millions


def test_no_program_holds_the_pairs():
    """Concatenation's tensor of pairs would be 2.5 GB here, a float32 map without a pool 39 MB."""
    x = jax.ShapeDtypeStruct((1, 56, 56, 256), jnp.float32)
    for mode in ('dot_product', 'concatenation', 'embedded_gaussian'):
        module = NonLocal(mode=mode, pool_size=1 if mode == 'embedded_gaussian' else 2)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        run = jax.jit(jax.grad(lambda v, x, m=module: jnp.square(m.apply(v, x)).sum()))
        memory = run.lower(variables, x).compile().memory_analysis().temp_size_in_bytes
        assert memory < 40 * 2**20, mode


def test_names_follow_the_form():
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32)

    def names(source=None, **arguments):
        shapes = jax.eval_shape(NonLocal(**arguments).init, jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
        state = torch.to_state_dict('non_local', variables, source=source, **arguments)
        return {name.rsplit('.', 1)[0] for name in state}

    assert names() == {'theta', 'phi', 'g', 'out', 'bn'}
    after = {'pool_position': 'after'}
    assert names(**after) == {'theta', 'phi.0', 'g.0', 'W.0', 'W.1'}
    assert names(pool_size=1, normalization=None, **after) == {'theta', 'phi', 'g', 'W'}
    assert names(mode='gaussian', **after) == {'g.0', 'W.0', 'W.1'}
    assert 'concat_project.0' in names(mode='concatenation', **after)
    assert names('mmcv', normalization=None) == {
        'theta.conv', 'phi.0.conv', 'g.0.conv', 'conv_out.conv'
    }  # fmt: skip
    assert names('timm', pool_size=1) == {'t', 'p', 'g', 'z', 'norm'}
    assert names('cgnl', pool_size=1) == {'t', 'p', 'g', 'z', 'bn'}
    assert {'theta_w', 'out_b', 'bn_s', 'bn_riv'} <= names('caffe2')


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'mode': 'cosine'}, 'mode'),
        ({'scale': 'width'}, 'scale'),
        ({'scale': 'input', 'mode': 'gaussian'}, 'scale'),
        ({'scale': 0.5, 'mode': 'dot_product'}, 'scale'),
        ({'pool_position': 'between'}, 'pool_position'),
        ({'normalization': 'layer'}, 'normalization'),
        ({'spatial_dims': 4}, 'spatial_dims'),
        ({'spatial_dims': 3}, r'x must be \[\.\.\., t, h, w, c\]'),
        ({'reduction': 0}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'pool_size': 0}, 'pool_size'),
        ({'pool_size': 5}, 'pool_size 5'),
        ({'chunk_size': 0}, 'chunk_size'),
        ({'group_size': 2}, 'group_size'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        NonLocal(**arguments).init(jax.random.key(0), jnp.zeros((4, 6, 8)))


def test_a_group_divides_the_frames():
    with pytest.raises(ValueError, match='group_size 3'):
        NonLocal(spatial_dims=3, group_size=3).init(jax.random.key(0), jnp.zeros((4, 2, 2, 8)))
