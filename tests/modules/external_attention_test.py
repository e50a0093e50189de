import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import ExternalAttention, MultiHeadExternalAttention, functional
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'external_attention': {
        'counts': (164_608, 513_802_240),
        'zero_gradients': {'': ('in_projection/bias',)},
    },
    'multihead_external_attention': {
        'counts': (529_760, 2_055_208_960),
        'zero_gradients': {'': ('in_projection/bias', 'memory_key/bias')},
    },
}

CORE = {'projection': False, 'residual': False, 'activation': None}


def weigh(xp, logits, weighting, epsilon):
    """Weights of logits [..., n, k]."""
    if weighting == 'softmax':
        p = xp.exp(logits)
        return p / p.sum(-1, keepdims=True)
    p = xp.exp(logits - logits.max(-2, keepdims=True))
    p = p / p.sum(-2, keepdims=True)
    return p / (epsilon + p.sum(-1, keepdims=True))


def reading(weighting='double', epsilon=1e-9, residual=True, relu=True, train=False):
    """The equation in plain arrays; projection and ties are seen from the variables."""

    def read(xp, variables, x):
        params = variables['params']
        rows = x.reshape(len(x), -1, x.shape[-1])
        y = rows
        if 'in_projection' in params:
            layer = params['in_projection']
            y = y @ layer['kernel'] + layer['bias'][None, None]
        key = params['memory_key']['kernel']
        value = params['memory_value']['kernel'] if 'memory_value' in params else key.T
        y = weigh(xp, y @ key, weighting, epsilon) @ value
        if 'out_projection' in params:
            y = y @ params['out_projection']['kernel']
            y = helpers.normalize(xp, variables, ('norm',), y, train)
        y = y + rows if residual else y
        return (xp.maximum(y, 0) if relu else y).reshape(x.shape)

    return read


def multihead_reading(heads, expansion, weighting='double', epsilon=1e-9):
    """The equation in plain arrays, one head after another."""

    def read(xp, variables, x):
        def dense(y, name):
            layer = variables['params'][name]
            return y @ layer['kernel'] + layer['bias'][None, None]

        c = x.shape[-1]
        e, rows = c // heads, x.reshape(len(x), -1, c)
        y, out = dense(rows, 'in_projection'), []
        for head in range(heads * expansion):
            part = dense(y[..., head * e : (head + 1) * e], 'memory_key')
            out.append(dense(weigh(xp, part, weighting, epsilon), 'memory_value'))
        return dense(xp.concatenate(out, -1), 'out_projection').reshape(x.shape)

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {'train': True}),
        ({'memory_tie': 'always', 'epsilon': 0.3}, {'epsilon': 0.3}),
        ({'weighting': 'softmax', 'activation': None}, {'weighting': 'softmax', 'relu': False}),
        ({'epsilon': 0.0, **CORE}, {'epsilon': 0, 'residual': False, 'relu': False}),
    ],
)  # fmt: skip
def test_equation(x64, arguments, options):
    helpers.check(
        ExternalAttention(memory_size=5, **arguments),
        reading(**options),
        helpers.array((3, 5, 4, 6)),
        train=options.get('train', False),
    )


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({'heads': 2, 'memory_size': 5}, {'heads': 2, 'expansion': 4}),
        (
            {'heads': 3, 'expansion': 2, 'memory_size': 4, 'weighting': 'softmax'},
            {'heads': 3, 'expansion': 2, 'weighting': 'softmax'},
        ),
        (
            {'heads': 1, 'expansion': 2, 'memory_size': 3, 'epsilon': 0.2},
            {'heads': 1, 'expansion': 2, 'epsilon': 0.2},
        ),
    ],
)
def test_multihead_equation(x64, arguments, options):
    module = MultiHeadExternalAttention(**arguments)
    helpers.check(module, multihead_reading(**options), helpers.array((2, 3, 4, 6)))


def test_single_softmax_is_attention_to_the_memory(x64):
    x = jnp.asarray(helpers.array((2, 3, 4, 6)))
    module = ExternalAttention(weighting='softmax', **CORE)
    variables = helpers.random_variables(module, x)
    key, value = (variables['params'][f'memory_{name}']['kernel'] for name in ('key', 'value'))
    want = functional.attend(x.reshape(2, 12, 6), jnp.asarray(key.T), jnp.asarray(value), scale=1.0)
    helpers.assert_close(module.apply(variables, x), want.reshape(x.shape))


@pytest.mark.parametrize(
    'module', [ExternalAttention(), ExternalAttention(**CORE), MultiHeadExternalAttention()]
)
def test_positions_may_be_permuted(module):
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    order = np.random.default_rng(0).permutation(20)
    permute = lambda y: y.reshape(2, 20, -1)[:, order].reshape(y.shape)  # noqa: E731
    variables = helpers.random_variables(module, x, dtype=np.float32)
    want = permute(module.apply(variables, x))
    helpers.assert_close(module.apply(variables, permute(x)), want, 1e-5)


def test_memories_start_as_they_are_tied():
    x = jnp.zeros((1, 2, 2, 128))
    init = lambda **a: ExternalAttention(**a).init(jax.random.key(0), x)['params']  # noqa: E731
    params = init()
    key, value = params['memory_key']['kernel'], params['memory_value']['kernel']
    np.testing.assert_array_equal(value, key.T)
    for kernel in (key, params['in_projection']['kernel'], params['out_projection']['kernel']):
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 128), rtol=0.05)
    assert params['in_projection']['bias'].any()
    assert 'memory_value' not in init(memory_tie='always')
    for arguments, std in (({}, np.sqrt(2 / 128)), (CORE, 0.001)):
        params = init(memory_tie='none', **arguments)
        key, value = params['memory_key']['kernel'], params['memory_value']['kernel']
        assert np.abs(np.corrcoef(key.T.ravel(), value.ravel())[0, 1]) < 0.1
        np.testing.assert_allclose([key.std(), value.std()], std, rtol=0.05)
    many = MultiHeadExternalAttention().init(jax.random.key(0), x)['params']
    np.testing.assert_allclose(many['in_projection']['kernel'].std(), 0.02, rtol=0.05)
    assert not any(layer['bias'].any() for layer in many.values())


def test_a_tied_memory_gets_both_gradients(x64):
    x = jnp.asarray(helpers.array((2, 3, 4, 6)))
    free, tied = ExternalAttention(**CORE), ExternalAttention(memory_tie='always', **CORE)
    key = jnp.asarray(helpers.array((6, 64)))
    both = {'memory_key': {'kernel': key}, 'memory_value': {'kernel': key.T}}
    loss = lambda p, m: jnp.sin(m.apply({'params': p}, x)).sum()  # noqa: E731
    separate = jax.grad(loss)(both, free)
    together = jax.grad(loss)({'memory_key': {'kernel': key}}, tied)['memory_key']['kernel']
    want = separate['memory_key']['kernel'] + separate['memory_value']['kernel'].T
    helpers.assert_close(together, want)


def test_a_position_without_weight_needs_epsilon():
    """Its weights all underflow: nothing with epsilon, NaN without."""
    x = jnp.asarray([0.0, 1.0, -200.0], jnp.float32).reshape(1, 1, 3, 1)
    variables = {'params': {f'memory_{m}': {'kernel': jnp.ones((1, 1))} for m in ('key', 'value')}}
    core = lambda **a: ExternalAttention(memory_size=1, **CORE, **a)  # noqa: E731
    out, gradient = jax.value_and_grad(lambda x: core().apply(variables, x).sum())(x)
    np.testing.assert_allclose(core().apply(variables, x)[0, 0, :, 0], [1, 1, 0], atol=1e-6)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()
    assert np.isnan(core(epsilon=0.0).apply(variables, x)[0, 0, 2, 0])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_maps(dtype):
    """After both normalisations a position's weights sum to one, whatever the type of x."""
    x = jnp.asarray(helpers.array((2, 4, 5, 16)), dtype)
    for module, shape in (
        (ExternalAttention(memory_size=7), (2, 20, 7)),
        (MultiHeadExternalAttention(heads=4, memory_size=7), (2, 16, 20, 7)),
    ):
        variables = helpers.random_variables(module, x, dtype=np.float32)
        _, sown = module.apply(variables, x, mutable=['attention_maps'])
        weights = sown['attention_maps']['map']
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_dropout_is_for_training():
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    plain = MultiHeadExternalAttention()
    variables = helpers.random_variables(plain, x, dtype=np.float32)
    want = plain.apply(variables, x)
    rngs = {'dropout': jax.random.key(0)}
    module = plain.clone(dropout_rate=0.5, attention_dropout_rate=0.5)
    np.testing.assert_array_equal(module.apply(variables, x), want)
    np.testing.assert_array_equal(plain.apply(variables, x, train=True), want)
    out = plain.clone(dropout_rate=0.5).apply(variables, x, train=True, rngs=rngs)
    assert 0.3 < (out == 0).mean() < 0.7
    np.testing.assert_allclose(out, np.where(out == 0, 0, 2 * want), rtol=1e-5)
    out = plain.clone(attention_dropout_rate=0.5).apply(variables, x, train=True, rngs=rngs)
    assert np.abs(out - want).max() > 1e-3


@pytest.mark.parametrize(
    ('module', 'word'),
    [
        (ExternalAttention(memory_size=0), 'memory_size'),
        (ExternalAttention(weighting='sigmoid'), 'weighting'),
        (ExternalAttention(memory_tie='sometimes'), 'memory_tie'),
        (ExternalAttention(activation='relu7'), 'activation'),
        (ExternalAttention(epsilon=-1e-9), 'epsilon'),
        (MultiHeadExternalAttention(heads=5), 'heads'),
        (MultiHeadExternalAttention(heads=0), 'heads'),
        (MultiHeadExternalAttention(expansion=3), 'expansion'),
        (MultiHeadExternalAttention(expansion=0, memory_size=4), 'expansion'),
        (MultiHeadExternalAttention(memory_size=0), 'memory_size'),
        (MultiHeadExternalAttention(weighting='mean'), 'weighting'),
        (MultiHeadExternalAttention(epsilon=-1.0), 'epsilon'),
        (MultiHeadExternalAttention(dropout_rate=1.5), 'dropout_rate'),
        (MultiHeadExternalAttention(attention_dropout_rate=-0.1), 'attention_dropout_rate'),
    ],
)
def test_bad_arguments_are_named(module, word):
    with pytest.raises(ValueError, match=word):
        module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))


@pytest.mark.parametrize('module', [ExternalAttention(), MultiHeadExternalAttention()])
def test_bad_input_is_named(module):
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        module.init(jax.random.key(0), jnp.zeros((2, 32)))
