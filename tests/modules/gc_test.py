import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import GlobalContext
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'gc': {'counts': (8_753, 1_613_824), 'zero_gradients': {'': ('mask/bias',)}}}


def reading(eps=1e-5, gate=helpers.sigmoid):
    """The equation in plain arrays; pooling, fusion and transform are seen from the variables."""

    def branch(xp, params, context):
        z = context
        if 'reduce' in params:
            z = z @ params['reduce']['kernel'] + params['reduce']['bias'][None]
            z = z - z.mean(-1, keepdims=True)
            z = z / xp.sqrt((z**2).mean(-1, keepdims=True) + eps)
            z = xp.maximum(z * params['norm']['scale'][None] + params['norm']['bias'][None], 0)
        return z @ params['expand']['kernel'] + params['expand']['bias'][None]

    def read(xp, variables, x):
        params = variables['params']
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if 'mask' in params:
            logits = rows @ params['mask']['kernel'] + params['mask']['bias'][None, None]
            weights = xp.exp(logits - logits.max(1, keepdims=True))
            context = (weights * rows).sum(1) / weights.sum(1)
        else:
            context = rows.mean(1)
        if 'multiply' in params:
            x = x * gate(xp, branch(xp, params['multiply'], context))[:, None, None, :]
        if 'add' in params:
            x = x + branch(xp, params['add'], context)[:, None, None, :]
        return x

    return read


@pytest.mark.parametrize(
    ('arguments', 'options'),
    [
        ({'reduction': 4}, {}),
        ({'hidden': 5, 'fusion': ('multiply', 'add')}, {}),
        ({'hidden': 5, 'fusion': ('multiply',), 'norm_eps': 1e-2}, {'eps': 1e-2}),
        (
            {'hidden': 5, 'fusion': ('add', 'multiply'), 'gate': 'hard_sigmoid'},
            {'gate': lambda xp, z: xp.clip(z + 3, 0, 6) / 6},
        ),
        ({'hidden': 5, 'pooling': 'average'}, {}),
        ({'transform': 'linear'}, {}),
        ({'transform': 'linear', 'pooling': 'average'}, {}),
    ],
)
def test_equation(x64, arguments, options):
    helpers.check(GlobalContext(**arguments), reading(**options), helpers.array((3, 5, 4, 16)))


def test_training_changes_nothing():
    module = GlobalContext()
    x = jnp.asarray(helpers.array((2, 3, 4, 16), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    np.testing.assert_array_equal(
        module.apply(variables, x, train=True), module.apply(variables, x)
    )


@pytest.mark.parametrize('transform', ['bottleneck', 'linear'])
@pytest.mark.parametrize('pooling', ['attention', 'average'])
def test_fresh_addition_is_the_identity(pooling, transform):
    module = GlobalContext(pooling=pooling, transform=transform)
    x = jnp.asarray(helpers.array((2, 3, 5, 32), dtype=np.float32))
    out, variables = module.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)
    gradient = jax.grad(lambda p: (module.apply({'params': p}, x) ** 2).sum())(variables['params'])
    assert gradient['add']['expand']['kernel'].any()  # and it can leave it

    awake = module.clone(zero_init=False)
    assert np.abs(awake.init_with_output(jax.random.key(0), x)[0] - x).max() > 1e-3


def test_fresh_multiplication_halves():
    module = GlobalContext(fusion=('multiply',))
    x = jnp.asarray(helpers.array((2, 3, 5, 32), dtype=np.float32))
    np.testing.assert_array_equal(module.init_with_output(jax.random.key(0), x)[0], x / 2)


def test_mask_starts_with_the_authors_variance():
    params = GlobalContext().init(jax.random.key(0), jnp.zeros((1, 2, 2, 4096)))['params']
    np.testing.assert_allclose(params['mask']['kernel'].std(), np.sqrt(2 / 4096), rtol=0.05)
    np.testing.assert_array_equal(params['mask']['bias'], 0)


def test_every_position_gets_the_same_context():
    """Equivariant under a permutation of positions; out - x is one vector an image."""
    module = GlobalContext()
    x = jnp.asarray(helpers.array((2, 4, 5, 32), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    added = np.asarray(module.apply(variables, x) - x).reshape(2, -1, 32)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1], added.shape), atol=1e-5)
    turned = module.apply(variables, x[:, ::-1, ::-1])
    np.testing.assert_allclose(turned[:, ::-1, ::-1], module.apply(variables, x), atol=1e-5)


def test_map_sums_to_one_and_gathers_the_context():
    module = GlobalContext(transform='linear', zero_init=False)
    x = jnp.asarray(helpers.array((2, 4, 5, 8), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    out, sown = module.apply(variables, x, mutable=['attention_maps'])
    weights = sown['attention_maps']['map']
    assert weights.shape == (2, 4, 5)
    np.testing.assert_allclose(weights.sum((1, 2)), 1, rtol=1e-5)
    expand = variables['params']['add']['expand']
    context = np.einsum('bhw,bhwc->bc', weights, x)
    added = (context @ expand['kernel'] + expand['bias'])[:, None, None]
    np.testing.assert_allclose(out - x, np.broadcast_to(added, x.shape), atol=1e-5)


def test_logits_of_bfloat16_are_not_rounded():
    """Two logits near 100 that differ by 0.2: bfloat16 would make them equal."""
    module = GlobalContext()
    x = jnp.zeros((1, 1, 2, 16), jnp.bfloat16).at[0, 0, :, 0].set(100).at[0, 0, 0, 1].set(0.2)
    variables = module.init(jax.random.key(0), x)
    variables['params']['mask']['kernel'] = jnp.ones((16, 1))
    _, sown = module.apply(variables, x, mutable=['attention_maps'])
    weight = sown['attention_maps']['map'][0, 0, 0]
    np.testing.assert_allclose(weight, 1 / (1 + np.exp(-0.2)), atol=1e-3)


def test_one_hidden_feature_is_its_norms_bias():
    module = GlobalContext(hidden=1)
    x = jnp.asarray(helpers.array((2, 3, 3, 8), dtype=np.float32))
    variables = helpers.random_variables(module, x, dtype=np.float32)
    gradient = jax.grad(lambda p: (module.apply({'params': p}, x) ** 2).sum())(variables['params'])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient['add']['reduce']['kernel'], 0)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'reduction': 0}, 'reduction'),
        ({'reduction': 33}, 'reduction'),
        ({'hidden': 0}, 'hidden'),
        ({'pooling': 'max'}, 'pooling'),
        ({'fusion': ()}, 'fusion'),
        ({'fusion': ('add', 'add')}, 'fusion'),
        ({'fusion': ('subtract',)}, 'fusion'),
        ({'fusion': 'add'}, 'fusion'),
        ({'transform': 'mlp'}, 'transform'),
        ({'transform': 'linear', 'fusion': ('multiply',)}, 'fusion'),
        ({'gate': 'softmax'}, 'gate'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    x = jnp.zeros((1, 2, 2, 32))
    with pytest.raises(ValueError, match=word):
        GlobalContext(**arguments).init(jax.random.key(0), x)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r'x must be \[\.\.\., h, w, c\]'):
        GlobalContext().init(jax.random.key(0), jnp.zeros((2, 32)))
