import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import QKVAttention, functional
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'qkv': {
        'counts': (82_241, 3_089_235_968),
        'zero_gradients': {'': ('key/bias',), 'channel': (), 'cosine_sigmoid': (), 'mlp': ()},
        'half_error': {'channel': 0.2},
    }
}


def pooled(y, s, dims, kind):
    """Windows of s by s (s on a line), what is left over dropped; frames are never pooled."""
    for axis in range(y.ndim - 1 - min(dims, 2), y.ndim - 1):
        length = y.shape[axis] // s
        index = (slice(None),) * axis
        y = y[(*index, slice(length * s))].reshape(*y.shape[:axis], length, s, *y.shape[axis + 1 :])
        y = y.max(axis + 1) if kind == 'max' else y.mean(axis + 1)
    return y


def reading(module, train=False):
    """The equations in plain arrays, with the tensor of pairs."""
    m = module

    def pairs(xp, params, q, k):
        """Similarities of q [b, g, n, l] and k [b, g, m, l]: [b, g, n, m]."""
        length = q.shape[-1]
        if m.similarity == 'cosine':
            q, k = (y / xp.maximum(xp.sqrt((y**2).sum(-1, keepdims=True)), 1e-12) for y in (q, k))
        if m.similarity in ('dot', 'scaled_dot', 'cosine'):
            s = xp.einsum('bgnl,bgml->bgnm', q, k)
            return s * length**-0.5 if m.similarity == 'scaled_dot' else s
        shape = (*q.shape[:2], q.shape[2], k.shape[2], length)
        q, k = xp.broadcast_to(q[:, :, :, None], shape), xp.broadcast_to(k[:, :, None], shape)
        if m.similarity == 'gaussian':
            return -((q - k) ** 2).sum(-1) / (2 * m.sigma**2)
        weight = params['similarity']['kernel'][:, 0]
        if m.similarity == 'mlp':
            return (xp.tanh(q + k) if m.activation == 'tanh' else xp.maximum(q + k, 0)) @ weight
        return xp.maximum(xp.concatenate([q, k], -1) @ weight, 0)

    def weigh(xp, s):
        s = m.scale * s
        if m.weighting == 'softmax':
            p = xp.exp(s - s.max(-1, keepdims=True))
            return p / p.sum(-1, keepdims=True)
        if m.weighting == 'sigmoid':
            return helpers.sigmoid(xp, s)
        s = xp.exp(s) if m.similarity == 'gaussian' else s
        return s / s.shape[-1] if m.weighting == 'mean' else s

    def read(xp, variables, x, context=None):
        params = variables.get('params', {})
        source = x if context is None else context

        def dense(y, name):
            if name not in params:
                return y
            kernel = params[name]['kernel']
            y = (y.reshape(-1, y.shape[-1]) @ kernel).reshape(*y.shape[:-1], -1)
            bias = params[name].get('bias')
            return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

        def pool(y, position):
            if m.pool_size == 1 or position != m.pool_position:
                return y
            return pooled(y, m.pool_size, m.spatial_dims, m.pool)

        def split(y):
            """[b, g, n, f / g]."""
            y = y.reshape(y.shape[0], -1, m.heads, y.shape[-1] // m.heads)
            return xp.moveaxis(y, 2, 1)

        before = pool(source, 'before')
        q = split(dense(x, 'query'))
        k, v = (split(pool(dense(before, name), 'after')) for name in ('key', 'value'))
        if m.axis == 'channel':
            p = weigh(xp, pairs(xp, params, xp.moveaxis(q, 2, 3), xp.moveaxis(k, 2, 3)))
            y = xp.einsum('bgij,bgnj->bngi', p, v)
        else:
            y = xp.einsum('bgnm,bgme->bnge', weigh(xp, pairs(xp, params, q, k)), v)
        y = dense(y.reshape(*x.shape[:-1], -1), 'out')
        if m.normalization:
            y = helpers.normalize(xp, variables, ('norm',), y, train)
        if m.residual == 'gamma':
            y = params['gamma'][0] * y
        return y if m.residual == 'none' else x + y

    return read


MAP = (2, 3, 4, 8)
CHANNEL = {'axis': 'channel', 'reduction': 2, 'value_reduction': 2, 'output_projection': True}
CASES = [
    {},
    {'similarity': 'dot', 'weighting': 'none', 'hidden': 6, 'heads': 2, 'scale': -0.7},
    {'similarity': 'dot', 'weighting': 'sigmoid', 'residual': 'plain', 'use_bias': False},
    {'similarity': 'cosine', 'hidden': 4, 'heads': 2, 'scale': 3.0, 'chunk_size': 5},
    {'similarity': 'cosine', 'weighting': 'mean', 'hidden': 5},
    {'similarity': 'gaussian', 'hidden': 3, 'sigma': 0.8, 'scale': 0.5},
    {'similarity': 'gaussian', 'hidden': 4, 'weighting': 'mean', 'heads': 2},
    {'similarity': 'mlp', 'hidden': 6, 'heads': 2, 'scale': 2.0, 'chunk_size': 5},
    {'similarity': 'mlp', 'hidden': 3, 'activation': 'relu', 'weighting': 'sigmoid'},
    {'similarity': 'mlp', 'hidden': 3, 'weighting': 'none'},
    {'similarity': 'concat', 'hidden': 4, 'heads': 2, 'scale': -2.0},
    {'similarity': 'concat', 'hidden': 3, 'weighting': 'sigmoid'},
    {'similarity': 'concat', 'hidden': 3, 'weighting': 'mean', 'scale': -2.0},
    {'similarity': 'concat', 'hidden': 3, 'weighting': 'none', 'pool_size': 3},
    {'projections': 'value', 'value_hidden': 3, 'output_projection': True, 'residual': 'none'},
    {'projections': 'identity', 'pool_size': 2, 'pool': 'average'},
    {'pool_size': 2, 'pool_position': 'before', 'pool': 'average', 'residual': 'none'},
    {'normalization': 'batch', 'residual': 'plain'},
    {**CHANNEL, 'similarity': 'scaled_dot', 'heads': 2},
    {**CHANNEL, 'similarity': 'cosine', 'weighting': 'sigmoid', 'normalization': 'batch'},
    {**CHANNEL, 'similarity': 'cosine', 'heads': 2, 'weighting': 'mean'},
    {'axis': 'channel', 'projections': 'identity', 'similarity': 'dot', 'weighting': 'none'},
]


def words(value):
    return ' '.join(map(str, value.values())) or 'default' if isinstance(value, dict) else None


@pytest.mark.parametrize('arguments', CASES, ids=words)
def test_equation(x64, arguments):
    module = QKVAttention(**arguments)
    helpers.check(module, reading(module), helpers.array(MAP))


@pytest.mark.parametrize(
    ('arguments', 'shapes'),
    [
        ({'spatial_dims': 1, 'pool_size': 2}, [(2, 7, 8)]),
        ({'spatial_dims': 3, 'pool_size': 2}, [(1, 3, 2, 4, 8)]),
        ({'spatial_dims': 3, 'axis': 'channel', 'reduction': 1}, [(1, 3, 2, 2, 8)]),
        ({'hidden': 3, 'pool_size': 2}, [MAP, (2, 5, 4, 6)]),
        ({'hidden': 4, 'heads': 2, 'similarity': 'concat'}, [MAP, (2, 2, 2, 6)]),
    ],
    ids=['line', 'video', 'video channel', 'context', 'context concat'],
)
def test_equation_of_other_inputs(x64, arguments, shapes):
    module = QKVAttention(**arguments)
    inputs = [helpers.array(shape, i) for i, shape in enumerate(shapes)]
    helpers.check(module, reading(module), *inputs)


def test_equation_in_training(x64):
    module = QKVAttention(output_projection=True, normalization='batch', residual='plain')
    helpers.check(module, reading(module, train=True), helpers.array(MAP), train=True)


# Section by section of the literature: a named mechanism, and the setting of qkv that it is.
NON_LOCAL = {
    'reduction': 2,
    'value_reduction': 2,
    'pool_size': 2,
    'output_projection': True,
    'normalization': 'batch',
    'residual': 'plain',
}
BEFORE = {'pool_position': 'before'}
NAMED = {
    'non_local': ('non_local', {}, {**NON_LOCAL, **BEFORE}),
    'non_local pooled after': (
        'non_local',
        {'scale': None, 'pool_position': 'after'},
        {**NON_LOCAL, 'similarity': 'dot'},
    ),
    'non_local gaussian': (
        'non_local',
        {'mode': 'gaussian'},
        {**NON_LOCAL, **BEFORE, 'projections': 'value', 'similarity': 'dot'},
    ),
    'non_local dot_product': (
        'non_local',
        {'mode': 'dot_product'},
        {**NON_LOCAL, **BEFORE, 'similarity': 'dot', 'weighting': 'mean'},
    ),
    'non_local concatenation': (
        'non_local',
        {'mode': 'concatenation', 'pool_position': 'after'},
        {**NON_LOCAL, 'similarity': 'concat', 'weighting': 'mean'},
    ),
    'non_local of timm': (
        'non_local',
        {'reduction': 8, 'scale': 'input', 'pool_size': 1},
        {
            **NON_LOCAL,
            'reduction': 8,
            'value_reduction': 8,
            'pool_size': 1,
            'similarity': 'dot',
            'scale': 16**-0.5,
        },
    ),
    'self_attention': ('self_attention', {}, {'similarity': 'dot'}),
    'self_attention without its spectral norm': (
        'self_attention',
        {'value_reduction': 2, 'output_projection': True, 'pool_size': 2, 'use_bias': False},
        {
            'value_reduction': 2,
            'output_projection': True,
            'pool_size': 2,
            'use_bias': False,
            'similarity': 'dot',
        },
    ),
    'pam': ('pam', {}, {'similarity': 'dot'}),
    'cam': (
        'cam',
        {},
        {'axis': 'channel', 'projections': 'identity', 'similarity': 'dot', 'scale': -1.0},
    ),
    'cam as printed': (
        'cam',
        {'similarity': 'dot'},
        {'axis': 'channel', 'projections': 'identity', 'similarity': 'dot'},
    ),
}


@pytest.mark.parametrize('case', NAMED)
def test_named_mechanisms_are_settings(x64, case):
    """The same parameters under the same names, the same values, gradients and statistics."""
    name, arguments, setting = NAMED[case]
    x = helpers.array((2, 4, 5, 16))
    named, general = attention_jax.create_attention(name, **arguments), QKVAttention(**setting)
    variables = helpers.random_variables(named, x)
    train = 'batch_stats' in variables
    cotangent = helpers.array(x.shape, 99)
    want = helpers.value_and_gradients(named, variables, (x,), cotangent, train)
    got = helpers.value_and_gradients(general, variables, (x,), cotangent, train)
    jax.tree.map(helpers.assert_close, got, want)
    shapes = jax.eval_shape(general.init, jax.random.key(0), x)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(np.shape, variables)


def test_cross_layer_non_local_is_a_setting(x64):
    x, other = helpers.array((2, 3, 4, 16)), helpers.array((2, 5, 4, 6), 1)
    named = attention_jax.CrossLayerNonLocal(layout='positions')
    variables = helpers.random_variables(named, x, other)
    general = QKVAttention(
        value_hidden=2, use_bias=False, output_projection=True, normalization='batch',
        residual='plain',
    )  # fmt: skip
    renamed = {
        collection: {name.removesuffix('_0'): layer for name, layer in layers.items()}
        for collection, layers in variables.items()
    }
    helpers.assert_close(general.apply(renamed, x, other), named.apply(variables, x, other))


def test_downsampled_self_attention_is_a_composition(x64):
    x = helpers.array((2, 4, 8, 16))
    named = attention_jax.DownsampledSelfAttention(pool_size=2)
    variables = helpers.random_variables(named, x)
    y = QKVAttention(residual='none').apply(variables, functional.avg_pool(x, 2))
    helpers.assert_close(x + functional.upsample(y, 2), named.apply(variables, x))


@pytest.mark.parametrize(
    ('arguments', 'shape'),
    [
        ({'hidden': 4}, (2, 12, 12)),
        ({'hidden': 4, 'heads': 2, 'pool_size': 3}, (2, 2, 12, 1)),
        ({'similarity': 'mlp', 'hidden': 4}, (2, 12, 12)),
        ({'similarity': 'concat', 'hidden': 4, 'heads': 2, 'weighting': 'mean'}, (2, 2, 12, 12)),
        ({'axis': 'channel', 'reduction': 1}, (2, 8, 8)),
        ({'axis': 'channel', 'reduction': 1, 'heads': 2}, (2, 2, 4, 4)),
    ],
    ids=words,
)
def test_map(arguments, shape):
    """The map is what the values are mixed by, and its rows come alone."""
    x = jnp.asarray(helpers.array(MAP, dtype=np.float32))
    module = QKVAttention(residual='none', **arguments)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    out, sown = module.apply(variables, x, mutable=['attention_maps'])
    weights = sown['attention_maps']['map']
    assert weights.shape == shape
    layer = variables['params']['value']
    v = x @ layer['kernel'] + layer['bias'][None, None, None]
    v = v if module.pool_size == 1 else functional.max_pool(v, 3)
    v = v.reshape(2, -1, module.heads, 8 // module.heads)
    p = weights.reshape(2, module.heads, *shape[-2:])
    mix = 'bgij,bngj->bngi' if module.axis == 'channel' else 'bgnm,bmge->bnge'
    helpers.assert_close(out, jnp.einsum(mix, p, v).reshape(x.shape), 1e-5)
    if module.axis == 'space':
        (rows,) = attention_jax.attention_maps(module, variables, x, queries=(5, 0)).values()
        helpers.assert_close(rows, weights[..., jnp.asarray([5, 0]), :], 1e-5)


@pytest.mark.parametrize('normalization', ['batch', None])
def test_plain_residual_starts_as_the_identity(normalization):
    x = jnp.asarray(helpers.array((2, 4, 4, 16), dtype=np.float32))
    module = QKVAttention(output_projection=True, residual='plain', normalization=normalization)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(module.apply(variables, x), x)
    loose = module.clone(zero_init=False)
    assert np.abs(loose.apply(loose.init(jax.random.key(0), x), x) - x).max() > 0


@pytest.mark.parametrize('similarity', ['cosine', 'gaussian', 'concat'])
def test_gradients_stay_finite(similarity):
    """At zero vectors, and in bfloat16 far from scale 1."""
    module = QKVAttention(similarity=similarity, residual='plain')
    x = jnp.asarray(helpers.array((1, 2, 3, 16), dtype=np.float32))
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    run = jax.jit(jax.grad(lambda v, x: module.apply(v, x).astype(jnp.float32).sum(), (0, 1)))
    for case in (jnp.zeros_like(x), (1e3 * x).astype(jnp.bfloat16)):
        empty = jax.tree.map(jnp.zeros_like, variables) if not case.any() else variables
        for leaf in jax.tree.leaves(run(empty, case)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_no_program_holds_the_pairs():
    """2.5 GB of pairs of features under mlp and concat, 39 MB of pairs of positions under dot."""
    x = jax.ShapeDtypeStruct((1, 56, 56, 64), jnp.float32)
    for arguments in (
        {'similarity': 'mlp'},
        {'similarity': 'concat'},
        {'similarity': 'dot'},
        {'axis': 'channel', 'reduction': 1},
    ):
        module = QKVAttention(**arguments)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        run = jax.jit(jax.grad(lambda v, x, m=module: jnp.square(m.apply(v, x)).sum()))
        memory = run.lower(variables, x).compile().memory_analysis().temp_size_in_bytes
        assert memory < 70 * 2**20, arguments


def test_weights_say_the_channels_of_the_context():
    path = helpers.REFERENCE / 'qkv' / 'cross.npz'
    meta, arrays = helpers.load_case(path)
    state = helpers.prefixed(arrays, 'state/')
    _, variables, report = torch.from_state_dict('qkv', state, **meta['arguments'])
    assert report.faults == 0
    assert variables['params']['key']['kernel'].shape == (10, 6)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'axis': 'time'}, 'axis'),
        ({'spatial_dims': 4}, 'spatial_dims'),
        ({'spatial_dims': 3}, r'x must be \[\.\.\., t, h, w, c\]'),
        ({'projections': 'query'}, 'projections'),
        ({'similarity': 'rbf'}, 'similarity'),
        ({'activation': 'gelu'}, 'activation'),
        ({'weighting': 'max'}, 'weighting'),
        ({'pool': 'median'}, 'pool'),
        ({'pool_position': 'between'}, 'pool_position'),
        ({'normalization': 'layer'}, 'normalization'),
        ({'residual': 'scaled'}, 'residual'),
        ({'sigma': 0}, 'sigma'),
        ({'chunk_size': 0}, 'chunk_size'),
        ({'pool_size': 0}, 'pool_size'),
        ({'pool_size': 5}, 'pool_size 5'),
        ({'reduction': 0}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'value_reduction': 0}, 'value_reduction'),
        ({'value_reduction': 2}, 'output_projection'),
        ({'heads': 2}, 'heads 2'),
        ({'heads': 0, 'hidden': 4}, 'heads'),
        ({'hidden': 3, 'value_hidden': 4, 'heads': 3, 'output_projection': True}, 'heads 3'),
        ({'similarity': 'gaussian', 'weighting': 'sigmoid'}, 'sigmoid'),
        ({'projections': 'identity', 'hidden': 4}, 'hidden'),
        ({'projections': 'identity', 'value_hidden': 8}, 'value_hidden'),
        ({'projections': 'value', 'hidden': 4}, 'hidden 4'),
        ({'axis': 'channel'}, 'as many features'),
        ({'axis': 'channel', 'reduction': 1, 'pool_size': 2}, 'pool_size 2'),
        *(
            ({'axis': 'channel', 'reduction': 1, 'similarity': s}, f'similarity {s!r}')
            for s in ('mlp', 'concat', 'gaussian')
        ),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        QKVAttention(**arguments).init(jax.random.key(0), jnp.zeros((4, 6, 8)))


@pytest.mark.parametrize(
    ('arguments', 'shape', 'word'),
    [
        ({'axis': 'channel', 'reduction': 1}, (2, 4, 6, 8), "context is for axis 'space'"),
        ({'projections': 'value'}, (2, 2, 2, 6), 'context of 6 channels'),
        ({'projections': 'identity'}, (2, 2, 2, 6), 'context of 6 channels'),
        ({}, (3, 2, 2, 8), 'context must have the leading axes'),
        ({}, (2, 2, 8), 'context must have the leading axes'),
        ({'pool_size': 3}, (2, 2, 2, 8), 'pool_size 3'),
    ],
)
def test_bad_contexts_are_named(arguments, shape, word):
    with pytest.raises(ValueError, match=word):
        QKVAttention(**arguments).init(jax.random.key(0), jnp.zeros((2, 4, 6, 8)), jnp.zeros(shape))
