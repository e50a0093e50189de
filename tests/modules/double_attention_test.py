import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import DoubleAttention, functional
from attention_jax.models import placement
from attention_jax.modules.registry import attention_entry
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'double_attention': {
        'counts': (65_984, 231_211_008),
        'zero_gradients': {
            '': ('gather/bias',),
            'double_atten': ('gather/bias', 'distribute/bias'),
        },
    }
}


def reading(spatial_dims=2, mean=False, distribute_axis=-1, residual=True, train=False):
    """The equation in plain arrays, by the map of all pairs."""

    def softmax(xp, s, axis):
        p = xp.exp(s - s.max(axis, keepdims=True))
        return p / p.sum(axis, keepdims=True)

    def read(xp, variables, x):
        params = variables['params']

        def dense(y, name):
            y = y @ params[name]['kernel']
            return y + params[name]['bias'][None, None] if 'bias' in params[name] else y

        rows = x.reshape(len(x), -1, x.shape[-1])
        b = softmax(xp, dense(rows, 'gather'), 1) / (rows.shape[1] if mean else 1)
        v = softmax(xp, dense(rows, 'distribute'), distribute_axis)
        z = (v @ b.swapaxes(1, 2)) @ dense(rows, 'feature')
        if 'out' in params:
            z = dense(z, 'out')
        if 'norm' in params:
            z = helpers.normalize(xp, variables, ('norm',), z, train)
        z = z.reshape(*x.shape[:-1], z.shape[-1])
        return x + z if residual else z

    return read


@pytest.mark.parametrize('association', ['gather', 'pairwise'])
@pytest.mark.parametrize(
    ('arguments', 'options', 'shape'),
    [
        ({}, {}, (2, 3, 4, 8)),
        (
            {'hidden': 3, 'descriptors': 5, 'reconstruct': False, 'residual': False},
            {'residual': False},
            (2, 4, 3, 4),
        ),
        (
            {
                'reduction': 1,
                'gather': 'mean',
                'distribute': 'positions',
                'reconstruct': False,
                'use_bias': False,
            },
            {'mean': True, 'distribute_axis': 1},
            (2, 3, 4, 5),
        ),
        ({'spatial_dims': 3, 'hidden': 3}, {'spatial_dims': 3}, (2, 2, 3, 2, 4)),
        ({'spatial_dims': 1, 'hidden': 3}, {'spatial_dims': 1}, (2, 7, 4)),
    ],
)
def test_equation(x64, arguments, options, shape, association):
    module = DoubleAttention(**arguments, association=association)
    helpers.check(module, reading(**options), helpers.array(shape))


@pytest.mark.parametrize('train', [False, True])
def test_norm(x64, train):
    module = DoubleAttention(normalization='batch')
    helpers.check(module, reading(train=train), helpers.array((2, 3, 4, 8)), train=train)


def test_training_changes_nothing_without_a_norm():
    module = DoubleAttention()
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    apply = jax.jit(module.apply, static_argnames='train')
    np.testing.assert_array_equal(apply(variables, x, train=True), apply(variables, x))


def test_it_is_linear_attention_of_two_softmaxes(x64):
    """`attend` without a weighting, of V, B and F, is the same product in the cheaper order."""
    module = DoubleAttention(hidden=3, descriptors=4, reconstruct=False, residual=False)
    x = helpers.array((2, 3, 4, 8))
    params = helpers.random_variables(module, x)['params']
    f, b, v = (
        (x @ params[name]['kernel'] + params[name]['bias']).reshape(2, 12, -1)
        for name in ('feature', 'gather', 'distribute')
    )

    @jax.jit
    def attend(v, b, f):
        v, b = jax.nn.softmax(v, -1), jax.nn.softmax(b, 1)
        return functional.attend(v, b, f, weighting='none', scale=1.0)

    out = jax.jit(module.apply)({'params': params}, x)
    helpers.assert_close(out, attend(v, b, f).reshape(2, 3, 4, 3), 1e-12)


@pytest.mark.parametrize('distribute', ['descriptors', 'positions'])
def test_permuted_positions_give_permuted_results(distribute):
    module = DoubleAttention(distribute=distribute)
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    order = np.random.default_rng(0).permutation(20)

    def shuffle(y):
        return y.reshape(2, 20, 16)[:, order].reshape(y.shape)

    apply = jax.jit(module.apply)
    helpers.assert_close(apply(variables, shuffle(x)), shuffle(apply(variables, x)), 1e-5)


def test_one_descriptor_is_handed_to_every_position():
    module = DoubleAttention(descriptors=1)
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    added = np.asarray(jax.jit(module.apply)(variables, x) - x).reshape(2, 12, 16)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1], added.shape), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: (module.apply({'params': p}, x) ** 2).sum()))(
        variables['params']
    )
    np.testing.assert_array_equal(gradient['distribute']['kernel'], 0)


@pytest.mark.parametrize('normalization', [None, 'batch'])
def test_zero_init_is_the_identity_and_can_leave_it(normalization):
    module = DoubleAttention(zero_init=True, normalization=normalization)
    x = jnp.asarray(helpers.array((1, 3, 4, 16), dtype=np.float32))
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    grad = jax.jit(jax.grad(lambda p: (module.apply({**variables, 'params': p}, x) ** 2).sum()))
    gradient = grad(variables['params'])
    assert (gradient['norm']['scale'] if normalization else gradient['out']['kernel']).any()
    awake = module.clone(zero_init=False)
    assert np.abs(jax.jit(awake.init_with_output)(jax.random.key(0), x)[0] - x).max() > 1e-3


def test_maps():
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    module = DoubleAttention(descriptors=5, association='pairwise')
    variables = helpers.random_variables(module, x, dtype=np.float32)
    maps = attention_jax.attention_maps(module, variables, x)
    gather, distribute, pairs = (maps[k] for k in ('gather_map', 'distribute_map', 'pair_map'))
    assert (gather.shape, distribute.shape) == ((2, 5, 12), (2, 12, 5))
    np.testing.assert_allclose(gather.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(distribute.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(pairs, distribute @ gather, rtol=1e-5)
    rows = attention_jax.attention_maps(module, variables, x, queries=(7,))['pair_map']
    np.testing.assert_allclose(rows, pairs[:, 7:8], rtol=1e-6)
    other = attention_jax.attention_maps(module.clone(association='gather'), variables, x)
    assert set(other) == {'gather_map', 'distribute_map'}


def test_softmax_of_bfloat16_is_float32():
    """40,000 equal weights: in bfloat16 a sum of ones would stop at 256."""
    module = DoubleAttention(hidden=1, residual=False, reconstruct=False)
    x = jnp.ones((1, 200, 200, 1), jnp.bfloat16)
    params = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x)['params'])
    out = jax.jit(module.apply)({'params': params}, x)
    np.testing.assert_allclose(np.asarray(out, np.float32), 2, rtol=0.01)
    maps = attention_jax.attention_maps(module, {'params': params}, x)
    assert all(weights.dtype == jnp.float32 for weights in maps.values())
    np.testing.assert_allclose(maps['gather_map'], 1 / 40_000, rtol=1e-3)


@pytest.mark.parametrize(
    ('association', 'macs'), [('gather', 2 * 784 * 16 * 8), ('pairwise', 784 * 784 * 24)]
)
def test_products_are_counted(association, macs):
    x = jax.ShapeDtypeStruct((1, 28, 28, 64), jnp.float32)
    module = DoubleAttention(descriptors=8, association=association)
    with functional.cost.tally() as counts:
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    assert counts['matmul'] == macs


def test_memory_at_32_frames():
    """Two gigabytes for the pairs of positions, and nothing near it for the descriptors."""
    x = jax.ShapeDtypeStruct((1, 32, 28, 28, 64), jnp.float32)
    module = DoubleAttention(spatial_dims=3)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    compiled = jax.jit(module.apply).lower(variables, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_backbones_put_it_between_blocks():
    entry = attention_entry('double_attention')
    assert placement.default(entry, (3, 4, 6, 3), 'bottleneck') == 'after_block@2:1,3+3:1,3,5'


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'descriptors': 0}, 'descriptors'),
        ({'gather': 'max'}, 'gather'),
        ({'distribute': 'batch'}, 'distribute'),
        ({'association': 'left'}, 'association'),
        ({'normalization': 'layer'}, 'normalization'),
        ({'spatial_dims': 4}, 'spatial_dims'),
        ({'reconstruct': False}, 'reconstruct'),
        ({'reconstruct': False, 'residual': False, 'normalization': 'batch'}, 'normalization'),
        ({'reconstruct': False, 'residual': False, 'zero_init': True}, 'zero_init'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        DoubleAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., t, h, w, c\]'):
        DoubleAttention(spatial_dims=3).init(jax.random.key(0), jnp.zeros((2, 2, 32)))
