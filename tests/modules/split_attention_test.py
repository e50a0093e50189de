import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import SelectiveKernel, SplitAttention, SqueezeExcite
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'split_attention': {'counts': (690_048, 1_849_786_368)}}


def reading(module, train=False):
    """The equation in plain arrays, group by group and split by split."""

    def read(xp, variables, x):
        params = variables['params']
        groups, radix = module.groups, module.radix

        def conv(name, y, parts, **options):
            y = helpers.convolve(xp, y, params[name]['kernel'], groups=parts, **options)
            return y + params[name]['bias'][None, None, None] if 'bias' in params[name] else y

        def norm(name, y):
            return helpers.normalize(xp, variables, (name,), y, train) if name in params else y

        y = conv('conv', x, groups * radix, strides=module.strides, dilation=module.dilation)
        y = xp.maximum(norm('norm0', y), 0)
        o = y.shape[-1] // radix
        splits = [y[..., r * o : (r + 1) * o] for r in range(radix)]
        s = sum(splits).mean((1, 2))[:, None, None]
        z = xp.maximum(norm('norm1', conv('fc1', s, groups)), 0)
        logits = conv('fc2', z, groups)[:, 0, 0]  # by group, then split
        width = o // groups
        out = []
        for k in range(groups):
            mine = [
                logits[:, (k * radix + r) * width : (k * radix + r + 1) * width]
                for r in range(radix)
            ]
            if radix == 1:
                weights = [helpers.sigmoid(xp, mine[0])]
            else:
                weights = [xp.exp(v) / sum(xp.exp(u) for u in mine) for v in mine]
            channels = slice(k * width, (k + 1) * width)
            out.append(
                sum(
                    u[..., channels] * w[:, None, None]
                    for u, w in zip(splits, weights, strict=True)
                )
            )
        return xp.concatenate(out, -1)

    return read


@pytest.mark.parametrize(
    ('arguments', 'train'),
    [
        ({'hidden': 5, 'strides': 2, 'dilation': 2}, False),
        ({'hidden': 6, 'groups': 2, 'features': 12}, True),
        ({'hidden': 6, 'groups': 2, 'radix': 1, 'kernel_size': 1}, True),
        ({'hidden': 5, 'radix': 4, 'use_bias': True, 'normalization': None}, False),
    ],
)
def test_equation(x64, arguments, train):
    module = SplitAttention(**arguments)
    helpers.check(module, reading(module, train), helpers.array((4, 5, 6, 8)), train=train)


@pytest.mark.parametrize('train', [False, True])
def test_two_splits_are_two_selective_kernels(x64, train):
    """A slice of the input for each branch is a convolution with as many groups."""
    sk = SelectiveKernel(split_input=True, kernel_sizes=(3, 3), groups=1, hidden=5, features=6)
    split = SplitAttention(radix=2, hidden=5, features=6)
    x = jnp.asarray(helpers.array((4, 5, 4, 8)))
    ours = helpers.random_variables(sk, x)
    params, stats = ours['params'], ours['batch_stats']

    def both(tree):
        pair = (tree['branch_0'], tree['branch_1'])
        return jax.tree.map(lambda a, b: np.concatenate([a, b], -1), *pair)

    joint, joint_stats = both(params), both(stats)
    theirs = {
        'params': {
            'conv': joint['conv'],
            'norm0': joint['norm'],
            'fc1': {'kernel': params['reduce']['kernel'][None, None], 'bias': np.zeros(5)},
            'norm1': params['reduce_norm'],
            'fc2': {'kernel': params['select']['kernel'][None, None], 'bias': np.zeros(12)},
        },
        'batch_stats': {'norm0': joint_stats['norm'], 'norm1': stats['reduce_norm']},
    }
    outputs = [
        module.apply(variables, x, train=train, mutable=['batch_stats', 'attention_maps'])
        for module, variables in ((sk, ours), (split, theirs))
    ]
    (a, a_changed), (b, b_changed) = outputs
    np.testing.assert_allclose(a, b, atol=1e-12)
    maps = [changed['attention_maps']['map'] for changed in (a_changed, b_changed)]
    np.testing.assert_allclose(*maps, atol=1e-12)
    np.testing.assert_allclose(maps[0].sum(1), 1, atol=1e-12)


def test_one_split_is_squeeze_and_excitation(x64):
    """Convolution, norm, ReLU, then `se` with a norm inside."""
    module = SplitAttention(radix=1, hidden=5)
    x = helpers.array((4, 5, 4, 6))
    variables = helpers.random_variables(module, x)
    params, stats = variables['params'], variables['batch_stats']
    y = helpers.convolve(np, x, params['conv']['kernel'])
    y = np.maximum(helpers.normalize(np, variables, ('norm0',), y, train=False), 0)
    flat = {
        name: {**params[name], 'kernel': params[name]['kernel'][0, 0]} for name in ('fc1', 'fc2')
    }
    want = SqueezeExcite(hidden=5, normalization='batch').apply(
        {'params': {**flat, 'norm': params['norm1']}, 'batch_stats': {'norm': stats['norm1']}}, y
    )
    np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-12)


def test_hidden_width_conventions():
    x = jax.ShapeDtypeStruct((1, 2, 2, 72), jnp.float32)
    for arguments, width in (({}, 36), ({'hidden_divisor': 8}, 40), ({'reduction': 16}, 32)):
        module = SplitAttention(**arguments)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
        assert shapes['fc1']['kernel'].shape == (1, 1, 72, width)


def test_size_is_that_of_a_convolution():
    x = jax.ShapeDtypeStruct((2, 9, 8, 8), jnp.float32)
    for arguments, size in (
        ({'strides': 2}, (5, 4)),
        ({'padding': 0}, (7, 6)),
        ({'kernel_size': 2, 'padding': 1, 'dilation': 2}, (9, 8)),
    ):
        out, _ = jax.eval_shape(SplitAttention(**arguments).init_with_output, jax.random.key(0), x)
        assert out.shape == (2, *size, 8)


def test_weights_survive_a_round_trip_at_any_width():
    """Of the 24 input channels the names' shapes show 6, those of one of four groups."""
    arguments = {'features': 40, 'groups': 2, 'hidden': 10}
    variables = helpers.random_variables(SplitAttention(**arguments), np.zeros((1, 3, 3, 24)))
    state = torch.to_state_dict('split_attention', variables, **arguments)
    _, back, _ = torch.from_state_dict('split_attention', state, **arguments)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'radix': 0}, 'radix'),
        ({'radix': 3}, 'radix 3'),
        ({'groups': 0}, 'groups'),
        ({'groups': 3}, 'groups 3'),
        ({'groups': 2, 'features': 7}, 'groups'),
        ({'groups': 2, 'hidden': 5}, 'groups'),
        ({'features': 0}, 'features'),
        ({'kernel_size': 2}, 'kernel_size'),
        ({'kernel_size': 0, 'padding': 0}, 'kernel_size'),
        ({'padding': -1}, 'padding'),
        ({'strides': 0}, 'strides'),
        ({'dilation': 0}, 'dilation'),
        ({'reduction': 0}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'min_hidden': 0}, 'min_hidden'),
        ({'hidden_divisor': 0}, 'hidden_divisor'),
        ({'normalization': 'layer'}, 'normalization'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        SplitAttention(**arguments).init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


def test_bad_input_is_named():
    module = SplitAttention()
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        module.init(jax.random.key(0), jnp.zeros((2, 8)))
    x = jnp.zeros((1, 3, 3, 8))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match='more than one value per channel'):
        jax.eval_shape(
            lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']), variables, x
        )
