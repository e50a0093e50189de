import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import SelectiveKernel
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'sk': {'counts': (62_528, 115_630_080)}}


def reading(module, train=False):
    """The equation in plain arrays, the branches stacked."""
    count = len(module.kernel_sizes)

    def read(xp, variables, x):
        params = variables['params']
        branches = []
        for m, k in enumerate(module.kernel_sizes):
            slices = x.shape[-1] // count
            part = x[..., m * slices : (m + 1) * slices] if module.split_input else x
            conv = params[f'branch_{m}']['conv']
            y = helpers.convolve(
                xp,
                part,
                conv['kernel'],
                strides=module.strides,
                dilation=module.dilation * ((k - 1) // 2 if module.dilated else 1),
                groups=module.groups,
            )
            if 'bias' in conv:
                y = y + conv['bias'][None, None, None]
            y = helpers.normalize(xp, variables, (f'branch_{m}', 'norm'), y, train)
            branches.append(xp.maximum(y, 0))
        u = xp.stack(branches, 1)  # [b, M, h, w, o]
        z = u.sum(1).mean((1, 2)) @ params['reduce']['kernel']
        if 'bias' in params['reduce']:
            z = z + params['reduce']['bias'][None]
        if 'reduce_norm' in params:
            z = xp.maximum(helpers.normalize(xp, variables, ('reduce_norm',), z, train), 0)
        logits = z @ params['select']['kernel']
        if 'bias' in params['select']:
            logits = logits + params['select']['bias'][None]
        weights = xp.exp(logits.reshape(x.shape[0], count, -1))
        weights = weights / weights.sum(1, keepdims=True)
        return xp.einsum('bmhwc,bmc->bhwc', u, weights)

    return read


@pytest.mark.parametrize(
    ('arguments', 'train'),
    [
        ({'groups': 4, 'hidden': 5}, False),
        ({'groups': 2, 'hidden': 5, 'features': 6, 'strides': 2, 'dilation': 2}, True),
        ({'groups': 2, 'hidden': 5, 'split_input': True, 'select_bias': True}, True),
        (
            {
                'groups': 1,
                'hidden': 5,
                'kernel_sizes': (1, 3, 5),
                'dilated': False,
                'use_bias': True,
                'squeeze_normalization': None,
                'squeeze_activation': 'identity',
                'squeeze_bias': True,
                'select_bias': True,
            },
            False,
        ),
    ],
)
def test_equation(x64, arguments, train):
    module = SelectiveKernel(**arguments)
    helpers.check(module, reading(module, train), helpers.array((4, 5, 6, 8)), train=train)


@pytest.mark.parametrize(
    ('features', 'arguments', 'width'),
    [
        (128, {}, 32),
        (1024, {}, 64),
        (256, {'hidden': 16}, 16),
        (128, {'min_hidden': 8, 'hidden_divisor': 8}, 8),
        (1024, {'hidden_divisor': 32}, 64),
        (256, {'reduction': 8, 'min_hidden': 16, 'hidden_divisor': 16}, 32),
    ],
)
def test_hidden_width_conventions(features, arguments, width):
    module = SelectiveKernel(**arguments)
    x = jax.ShapeDtypeStruct((1, 2, 2, features), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    assert shapes['reduce']['kernel'].shape == (features, width)


def test_weights_sum_to_one_over_the_branches():
    module = SelectiveKernel(kernel_sizes=(3, 5, 7), groups=2, features=6)
    x = jnp.asarray(helpers.array((3, 5, 4, 8), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    out, sown = jax.jit(lambda v, x: module.apply(v, x, mutable=['attention_maps']))(variables, x)
    weights = sown['attention_maps']['map']
    assert weights.shape == (3, 3, 6)
    assert out.shape == (3, 5, 4, 6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_layers_apart_in_pytorch_are_one_here():
    """The selection of branch m is columns m o ... (m + 1) o; several names for one array."""
    arguments = {'groups': 2, 'features': 6, 'hidden': 5, 'select_bias': True}
    module = SelectiveKernel(**arguments)
    variables = helpers.random_variables(module, np.zeros((1, 3, 3, 20)))
    state = torch.to_state_dict('sk', variables, source='pytorch', **arguments)
    select = variables['params']['select']
    for m in range(2):
        columns = slice(6 * m, 6 * m + 6)
        np.testing.assert_array_equal(
            state[f'fcs.{m}.weight'][:, :, 0, 0], select['kernel'][:, columns].T
        )
        np.testing.assert_array_equal(state[f'fcs.{m}.bias'], select['bias'][columns])
    # Nothing in these names says that there are 20 input channels but the groups of the kernels.
    _, back, report = torch.from_state_dict('sk', state, **arguments)
    assert report.source == 'pytorch'
    jax.tree.map(np.testing.assert_array_equal, back, variables)

    del state['fcs.1.bias']
    with pytest.raises(ValueError, match=r'missing: fcs\.1\.bias'):
        torch.from_state_dict('sk', state, **arguments)
    state['fcs.1.bias'] = np.zeros(7)
    with pytest.raises(ValueError, match=r'shape of fcs\.1\.bias'):
        torch.from_state_dict('sk', state, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'kernel_sizes': (3,)}, 'kernel_sizes'),
        ({'kernel_sizes': (3, 4)}, 'kernel_sizes'),
        ({'kernel_sizes': (1, 3)}, 'kernel_sizes 1'),
        ({'groups': 3}, 'groups'),
        ({'groups': 0}, 'groups'),
        ({'features': 10}, 'groups'),
        ({'features': 0}, 'features'),
        ({'split_input': True, 'groups': 8}, 'groups'),
        ({'split_input': True, 'kernel_sizes': (3, 5, 7)}, 'split_input'),
        ({'hidden': 0}, 'hidden'),
        ({'min_hidden': 0}, 'min_hidden'),
        ({'hidden_divisor': 0}, 'hidden_divisor'),
        ({'reduction': 0}, 'reduction'),
        ({'strides': 0}, 'strides'),
        ({'dilation': 0}, 'dilation'),
        ({'squeeze_normalization': 'layer'}, 'squeeze_normalization'),
        ({'squeeze_activation': 'relu7'}, 'squeeze_activation'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        SelectiveKernel(**{'groups': 4, **arguments}).init(
            jax.random.key(0), jnp.zeros((1, 2, 2, 8))
        )


def test_bad_input_is_named():
    module = SelectiveKernel(groups=1)
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        module.init(jax.random.key(0), jnp.zeros((2, 8)))
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, 3, 8)))
    with pytest.raises(ValueError, match='more than one value per channel'):
        jax.eval_shape(
            lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']),
            variables,
            jnp.zeros((1, 3, 3, 8)),
        )
