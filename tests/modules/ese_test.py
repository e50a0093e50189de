import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import EffectiveSqueezeExcite
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'ese': {'counts': (65_792, 65_536)}}


def hard(xp, v):
    return xp.clip(v + 3, 0, 6) / 6


def reading(squeeze='average', gate=hard):
    """The equation in plain arrays."""

    def read(xp, variables, x):
        params = variables['params']['fc']
        positions = x.reshape(x.shape[0], -1, x.shape[-1])
        y = positions.mean(1)
        if squeeze == 'average_max':
            y = 0.5 * y + 0.5 * positions.max(1)
        v = y @ params['kernel']
        if 'bias' in params:
            v = v + params['bias'][None]
        return x * gate(xp, v)[:, None, None, :]

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({}, {}),
        ({'use_bias': False, 'gate': 'sigmoid'}, {'gate': helpers.sigmoid}),
        ({'squeeze': 'average_max'}, {'squeeze': 'average_max'}),
    ],
)
def test_equation(x64, arguments, options):
    helpers.check(
        EffectiveSqueezeExcite(**arguments), reading(**options), 2 * helpers.array((3, 5, 4, 16))
    )


def test_gates_saturate_exactly():
    """Beyond 3 the gate is 0 or 1, and nothing of it is left to learn from."""
    module = EffectiveSqueezeExcite()
    x = jnp.asarray(helpers.array((2, 3, 3, 4), dtype=np.float32))
    bias = jnp.array([-100.0, 100.0, -3.5, 0.0])
    variables = {'params': {'fc': {'kernel': jnp.zeros((4, 4)), 'bias': bias}}}
    out, sown = module.apply(variables, x, mutable=['attention_maps'])
    np.testing.assert_array_equal(sown['attention_maps']['map'], [[0, 1, 0, 0.5]] * 2)
    np.testing.assert_array_equal(out, x * jnp.array([0, 1, 0, 0.5]).reshape(1, 1, 1, 4))
    gradient = jax.grad(lambda v: (module.apply(v, x) ** 2).sum())(variables)['params']['fc']
    np.testing.assert_array_equal(gradient['bias'] != 0, [False, False, False, True])


def test_permuted_positions_permute_the_output():
    module = EffectiveSqueezeExcite()
    x = jnp.asarray(helpers.array((2, 4, 5, 8), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    order = np.random.default_rng(0).permutation(20)
    mixed = x.reshape(2, 20, 8)[:, order].reshape(x.shape)
    want = module.apply(variables, x).reshape(2, 20, 8)[:, order]
    np.testing.assert_allclose(module.apply(variables, mixed).reshape(2, 20, 8), want, atol=1e-6)


def test_starts_as_the_authors_do():
    x = jnp.zeros((1, 1, 1, 512))
    params = EffectiveSqueezeExcite().init(jax.random.key(0), x)['params']['fc']
    np.testing.assert_allclose(params['kernel'].std(), np.sqrt(2 / 512), rtol=0.01)
    np.testing.assert_allclose(np.abs(params['bias']).max(), 1 / np.sqrt(512), rtol=0.01)


@pytest.mark.parametrize(
    ('arguments', 'word'), [({'gate': 'softmax'}, 'gate'), ({'squeeze': 'max'}, 'squeeze')]
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        EffectiveSqueezeExcite(**arguments).init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        EffectiveSqueezeExcite().init(jax.random.key(0), jnp.zeros((2, 4)))
