import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import ChannelAffinityAttention, DANetHead, PositionAttention, functional
from attention_jax.models import placement
from attention_jax.modules.registry import attention_entry
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {
    'cam': {'counts': (1, 411_041_792)},
    'danet_head': {
        'counts': (378_449, 1_918_529_536),
        'zero_gradients': {'': ('position/key/bias',)},
    },
    'pam': {'counts': (82_241, 3_089_235_968), 'zero_gradients': {'': ('key/bias',)}},
}


def softmax(xp, s):
    p = xp.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def dense(y, layer):
    return y @ layer['kernel'] + layer['bias'].reshape((1,) * (y.ndim - 1) + (-1,))


def read_position(xp, variables, x):
    """The equation in plain arrays."""
    params = variables['params']
    rows = x.reshape(len(x), -1, x.shape[-1])
    q, k, v = (dense(rows, params[name]) for name in ('query', 'key', 'value'))
    y = softmax(xp, q @ k.swapaxes(1, 2)) @ v
    return x + params['gamma'][0] * y.reshape(x.shape)


def read_channel(xp, variables, x, sign=-1):
    """The equation in plain arrays."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    weights = softmax(xp, sign * (rows.swapaxes(1, 2) @ rows))
    y = rows @ weights.swapaxes(1, 2)
    return x + variables['params']['gamma'][0] * y.reshape(x.shape)


def read_head(train):
    """The equation in plain arrays, without dropout."""

    def read(xp, variables, x):
        params = variables['params']

        def block(y, name):
            kernel, (h, w) = params[name]['conv']['kernel'], y.shape[1:3]
            y = xp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
            y = sum(y[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3))
            return xp.maximum(helpers.normalize(xp, variables, (name, 'norm'), y, train), 0)

        def inner(name):
            return {'params': params[name]}

        s_p = block(read_position(xp, inner('position'), block(x, 'position_in')), 'position_out')
        s_c = block(read_channel(xp, inner('channel'), block(x, 'channel_in')), 'channel_out')
        parts = {'fused_logits': s_p + s_c, 'position_logits': s_p, 'channel_logits': s_c}
        return tuple(dense(part, params[name]) for name, part in parts.items())

    return read


@pytest.mark.parametrize('arguments', [{'reduction': 4}, {'hidden': 3, 'chunk_size': 7}])
def test_position(x64, arguments):
    helpers.check(PositionAttention(**arguments), read_position, helpers.array((2, 5, 4, 8)))


@pytest.mark.parametrize(('similarity', 'sign'), [('negative_dot', -1), ('dot', 1)])
def test_channel(x64, similarity, sign):
    helpers.check(
        ChannelAffinityAttention(similarity=similarity),
        lambda xp, variables, x: read_channel(xp, variables, x, sign),
        helpers.array((2, 5, 4, 6)),
    )


@pytest.mark.parametrize('train', [False, True])
def test_head(x64, train):
    module = DANetHead(3, reduction=2, dropout_rate=0.0)
    helpers.check(module, read_head(train), helpers.array((2, 4, 3, 16)), train=train)


@pytest.mark.parametrize('cls', [PositionAttention, ChannelAffinityAttention])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_starts_as_the_identity(cls, dtype):
    x = jnp.asarray(helpers.array((2, 4, 4, 16)), dtype)
    out, variables = cls().init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    loss = lambda p: (cls().apply({'params': p}, x).astype(jnp.float32) ** 2).sum()  # noqa: E731
    gradient = jax.grad(loss)(variables['params'])
    assert gradient.pop('gamma').any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('cls', [PositionAttention, ChannelAffinityAttention])
def test_positions_may_be_permuted(cls):
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32)) / 2
    order = np.random.default_rng(0).permutation(20)
    permute = lambda y: y.reshape(2, 20, -1)[:, order].reshape(y.shape)  # noqa: E731
    variables = helpers.random_variables(cls(), x, dtype=np.float32)
    out, sown = cls().apply(variables, x, mutable=['attention_maps'])
    turned, sown_turned = cls().apply(variables, permute(x), mutable=['attention_maps'])
    helpers.assert_close(turned, permute(out), 1e-5)
    want, got = sown['attention_maps']['map'], sown_turned['attention_maps']['map']
    if cls is PositionAttention:
        want = want[:, order][:, :, order]
    helpers.assert_close(got, want, 1e-5)


def test_channels_may_be_permuted():
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32)) / 2
    module, order = ChannelAffinityAttention(), np.random.default_rng(0).permutation(16)
    variables = {'params': {'gamma': jnp.ones(1)}}
    want = module.apply(variables, x)[..., order]
    helpers.assert_close(module.apply(variables, x[..., order]), want, 1e-5)


def test_position_is_self_attention(x64):
    """The same function under the same names."""
    x = jnp.asarray(helpers.array((2, 5, 4, 16)))
    variables = helpers.random_variables(PositionAttention(), x)
    other = attention_jax.create_attention('self_attention')
    helpers.assert_close(other.apply(variables, x), PositionAttention().apply(variables, x))


def test_channel_is_the_core_with_a_negative_scale(x64):
    x = jnp.asarray(helpers.array((2, 3, 4, 6)))
    channels = x.reshape(2, 12, 6).swapaxes(1, 2)
    y = functional.attend(channels, channels, channels, scale=-1.0)
    out = ChannelAffinityAttention().apply({'params': {'gamma': jnp.ones(1)}}, x)
    helpers.assert_close(out - x, y.swapaxes(1, 2).reshape(x.shape))


def test_rows_of_the_position_map():
    x = jnp.asarray(helpers.array((2, 4, 5, 16), dtype=np.float32))
    variables = helpers.random_variables(PositionAttention(), x, dtype=np.float32)
    (whole,) = attention_jax.attention_maps(PositionAttention(), variables, x).values()
    assert whole.shape == (2, 20, 20)
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    maps = attention_jax.attention_maps(PositionAttention(), variables, x, queries=(7, 2))
    np.testing.assert_allclose(maps['map'], whole[:, jnp.asarray([7, 2])], rtol=1e-5, atol=1e-7)


def test_energies_of_bfloat16_are_not_rounded():
    """Energies of 1024, 1025 and 1024: bfloat16 would make them equal."""
    x = jnp.zeros((1, 1, 1025, 3), jnp.bfloat16).at[..., :1024, :].set(1).at[..., -1, :2].set(1)
    module = ChannelAffinityAttention()
    variables = {'params': {'gamma': jnp.ones(1)}}
    _, sown = module.apply(variables, x, mutable=['attention_maps'])
    weights = np.exp([-1.0, -1.0, 0.0])
    np.testing.assert_allclose(
        sown['attention_maps']['map'][0, 0], weights / weights.sum(), rtol=1e-5
    )
    # Where float32 products are rounded unless told otherwise, they are told, also in the gradient.
    run = jax.grad(lambda x: module.apply(variables, x).sum())
    program = str(jax.make_jaxpr(run)(x.astype(jnp.float32)))
    assert program.count('Precision.HIGHEST, Precision.HIGHEST') == 3


def test_dropout_takes_whole_maps_out_of_each_output():
    """With the identity for its last layers the head shows its features."""
    x = jnp.asarray(helpers.array((4, 3, 5, 32), dtype=np.float32))
    module = DANetHead(8, dropout_rate=0.5)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    for name in ('fused_logits', 'position_logits', 'channel_logits'):
        variables['params'][name] = {'kernel': np.eye(8, dtype=np.float32), 'bias': np.zeros(8)}
    run = lambda module: module.apply(  # noqa: E731
        variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)}
    )[0]
    masks = []
    for kept, features in zip(run(module), run(module.clone(dropout_rate=0.0)), strict=True):
        mask = np.abs(kept).sum((1, 2), keepdims=True) > 0
        assert 0 < mask.mean() < 1
        np.testing.assert_allclose(kept, 2 * features * mask, atol=1e-4)
        masks.append(mask)
    assert not (masks[0] == masks[1]).all()
    assert not (masks[1] == masks[2]).all()


def test_parameters_of_the_head_on_a_resnet():
    x = jax.ShapeDtypeStruct((1, 8, 8, 2048), jnp.float32)
    params = jax.eval_shape(DANetHead(21).init, jax.random.key(0), x)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_957_697


def test_a_head_has_no_place_in_a_backbone():
    with pytest.raises(ValueError, match="'danet_head' has no place"):
        placement.default(attention_entry('danet_head'), (1, 1, 1), 'basic')


@pytest.mark.parametrize(
    ('module', 'word'),
    [
        (PositionAttention(reduction=0), 'reduction'),
        (PositionAttention(reduction=33), 'reduction'),
        (PositionAttention(hidden=0), 'hidden'),
        (PositionAttention(chunk_size=0), 'chunk_size'),
        (ChannelAffinityAttention(similarity='cosine'), 'similarity'),
        (DANetHead(0), 'num_classes'),
        (DANetHead(5, reduction=33), 'reduction'),
        (DANetHead(5, reduction=8), 'reduction'),  # nothing left for the position attention
        (DANetHead(5, dropout_rate=1.0), 'dropout_rate'),
    ],
)
def test_bad_arguments_are_named(module, word):
    with pytest.raises(ValueError, match=word):
        module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))


@pytest.mark.parametrize('module', [PositionAttention(), ChannelAffinityAttention(), DANetHead(5)])
def test_bad_input_is_named(module):
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        module.init(jax.random.key(0), jnp.zeros((2, 32)))
