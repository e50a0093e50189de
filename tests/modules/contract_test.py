"""What every registered mechanism promises, in every published variant."""

import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attention_jax
from attention_jax.modules.registry import (
    attention_entry,
    field_names,
    spatial_rank,
    starts_as_identity,
)
from tests import helpers

NAMES = attention_jax.list_attention()
VARIANTS = [
    pytest.param(name, variant, marks=[pytest.mark.slow] if arguments else [])
    for name in NAMES
    for variant, arguments in {'default': {}, **attention_entry(name).variants}.items()
    if arguments or variant == 'default'
]

# Enough for the quick tests where every mechanism takes the same way; the slow ones run them all.
IN_BRIEF = ('cbam', 'gc', 'non_local', 'se')

# What is expected of each mechanism stands in its own test file, as `CONTRACT`:
# counts: parameters and MACs at [1, 56, 56, 256] with default arguments, from the equations;
# zero_gradients: by variant ('' for all others), the parameters whose gradient is exactly zero in
#   evaluation, such as a constant added to a softmax's logits;
# half_error: by variant, the error of bfloat16 over the largest entry, where it may be above 0.06;
# too_small: the words that refuse a map of one row, and of one position; None where it is taken.
EXPECTED = helpers.contracts(pathlib.Path(__file__).parent)


def expected(name, what, variant, default):
    """What a variant is expected to do; an entry of the variant wins over that of all."""
    found = EXPECTED[name].get(what, {})
    return found.get(variant, found.get('', default))


SPATIAL = {1: (12,), 2: (16, 8), 3: (4, 16, 8)}  # sides of a map, by their number


class OnItself(nn.Module):
    """A mechanism that takes further maps, given the one it is called with for each."""

    inner: nn.Module
    maps: int

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x, *, train=False):
        return self.inner(*[x] * self.maps, train=train)


def build(name, variant='default', **more):
    entry = attention_entry(name)
    variants = {'default': {}, **entry.variants}
    arguments = {**entry.example((*SPATIAL[2], 64)), **variants[variant], **more}
    module = attention_jax.create_attention(name, **arguments)
    return OnItself(module, entry.maps) if entry.maps > 1 else module


def joined(out):
    """Several outputs of one map as one array."""
    return jnp.concatenate(out, -1) if isinstance(out, tuple) else out


def example(name, variant='default', batch=2):
    spatial = SPATIAL[spatial_rank(build(name, variant))]
    # Examples lie about a mean and its opposite in turn: no ReLU behind a pool is dead for all.
    sign = (-1.0) ** np.arange(batch).reshape(batch, *[1] * (len(spatial) + 1))
    x = sign * helpers.array((64,), 2) + helpers.array((batch, *spatial, 64))
    return jnp.asarray(x, jnp.float32)


def leaves(tree):
    return traverse_util.flatten_dict(tree, sep='/')


@pytest.mark.parametrize('name', NAMES)
def test_every_mechanism_says_what_it_is(name):
    entry = attention_entry(name)
    assert entry.paper
    assert 2015 <= entry.year <= 2026
    assert entry.family in ('channel', 'spatial', 'mixed', 'positions', 'block')
    assert getattr(attention_jax, entry.cls.__name__) is entry.cls
    classes = [cls for cls in entry.cls.__mro__ if 'Attributes:' in (cls.__doc__ or '')]
    assert classes[0].__doc__.count('Attributes:') == 1
    _, *parameters = inspect.signature(entry.cls.__call__).parameters.values()
    assert entry.maps == sum(p.default is p.empty for p in parameters)
    fields = field_names(entry.cls)
    assert {'dtype', 'param_dtype'} <= set(fields)
    documented = classes[0].__doc__.split('Attributes:')[1]
    for field in fields:
        line = re.search(rf'^ +{field}: ', documented, re.MULTILINE)
        assert field == 'name' or line, f'{field} is not documented'


def test_every_mechanism_has_its_counts():
    assert set(EXPECTED) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_counts(name):
    x = jax.ShapeDtypeStruct((1, 56, 56, 256), jnp.float32)
    module = build(name)
    with attention_jax.functional.cost.tally() as counts:
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables.get('params', {})))
    assert (parameters, counts['macs'] + counts['matmul']) == EXPECTED[name]['counts']


@pytest.mark.parametrize(('name', 'variant'), VARIANTS)
def test_variant(name, variant):
    """Shape and type kept, jit = eager, gradients finite and felt by every parameter, bfloat16."""
    entry, module, x = attention_entry(name), build(name, variant), example(name, variant)
    fresh = jax.eval_shape(module.init, jax.random.key(0), x)
    assert set(fresh) <= {'params', 'batch_stats', 'spectral'}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    if entry.preserves_shape and not isinstance(module, OnItself):
        fresh_output = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])
        change = np.abs(fresh_output(x) - x).max()
        assert change < 1e-6 if starts_as_identity(module) else change > 1e-3

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            out = joined(module.apply({**variables, 'params': params}, x))
            cotangent = jax.random.normal(jax.random.key(1), out.shape)
            return (out.astype(jnp.float32) * cotangent).sum(), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            variables.get('params', {}), x
        )
        return out, *grads

    zero = expected(name, 'zero_gradients', variant, ())
    out, by_params, by_x = run(variables, x)
    assert out.dtype == x.dtype
    assert (out.shape == x.shape) == entry.preserves_shape
    helpers.assert_close(out, joined(module.apply(variables, x)), 1e-5, 'jit and eager')
    assert np.isfinite(by_x).all()
    largest = max([np.abs(g).max() for g in (by_x, *leaves(by_params).values())])
    for path, gradient in leaves(by_params).items():
        assert np.isfinite(gradient).all(), path
        size = np.abs(gradient).max()
        if path in zero:
            assert size < 1e-5 * largest, f'{path} is listed as having no gradient'
        else:
            assert size > 1e-7, f'{path} has no gradient'

    half, half_params, half_x = run(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    scale = np.abs(out).max()
    allowed = expected(name, 'half_error', variant, 0.06) * scale
    assert np.abs(np.asarray(half, np.float32) - out).max() < allowed
    for leaf in jax.tree.leaves((half_params, half_x)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize('name', NAMES)
def test_batch_axes(name):
    """A batch of one, further leading axes and vmap all see each example alone in evaluation."""
    module, x = build(name), example(name)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))
    apply = jax.jit(lambda x: joined(module.apply(variables, x)))
    out = apply(x)
    helpers.assert_close(jnp.concatenate([apply(x[:1]), apply(x[1:])]), out, 1e-5, 'batch of one')
    helpers.assert_close(apply(x[:, None])[:, 0], out, 1e-5, 'leading axes')
    helpers.assert_close(jax.vmap(apply)(x[:, None])[:, 0], out, 1e-5, 'vmap')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_numerics(name, dtype):
    """Finite values and gradients far from scale 1, on constant, single-row and 1x1 maps.

    What refuses such a map is listed with the words in which it does; nothing else may.
    """
    module = build(name)
    x = example(name, batch=1)
    variables = jax.tree.map(jnp.asarray, helpers.random_variables(module, x, dtype=np.float32))

    @jax.jit
    def run(x):
        return jax.value_and_grad(
            lambda v, x: joined(module.apply(v, x)).astype(jnp.float32).mean(), argnums=(0, 1)
        )(variables, x)

    for case in (x * 1e3, x * 1e-3, jnp.full_like(x, 3.0), jnp.zeros_like(x)):
        for leaf in jax.tree.leaves(run(case.astype(dtype))):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
    refusals = EXPECTED[name].get('too_small', (None, None))
    for small, refusal in zip((x[..., :1, :, :], x[..., :1, :1, :]), refusals, strict=True):
        if refusal:
            with pytest.raises(ValueError, match=refusal):
                run(small.astype(dtype))
            continue
        for leaf in jax.tree.leaves(run(small.astype(dtype))):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize('name', NAMES)
def test_maps_only_on_request(name):
    entry, module, x = attention_entry(name), build(name), example(name)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert 'attention_maps' not in variables
    apply = functools.partial(module.apply, mutable=['attention_maps'])
    _, sown = jax.eval_shape(apply, variables, x)
    assert bool(jax.tree.leaves(sown)) == entry.has_map


@pytest.mark.parametrize('name', NAMES)
def test_no_device_gathers_the_batch(name):
    """On eight devices forward and gradient keep each example where it is."""
    module = build(name)
    x = example(name, batch=8)
    variables = helpers.random_variables(module, x, dtype=np.float32)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    replicated = NamedSharding(mesh, PartitionSpec())

    def loss(params, x):
        out, _ = module.apply(
            {**variables, 'params': params},
            x,
            train=True,
            mutable=['batch_stats', 'spectral'],
            rngs={'dropout': jax.random.key(0)},
        )
        return jnp.square(joined(out)).sum()

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(
                jax.grad(loss, argnums=(0, 1)),
                in_shardings=(replicated, sharding),
                out_shardings=(replicated, sharding),
            )
            .lower(variables.get('params', {}), x)
            .compile()
        )
    text = compiled.as_text()
    gathered = [line for line in text.splitlines() if ' all-gather(' in line]
    assert not [line for line in gathered if f'[{x.shape[0]},' in line.split('all-gather(')[0]]


@pytest.mark.parametrize(
    'name', [n if n in IN_BRIEF else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_one_training_step_through_nnx(name):
    import optax

    x = example(name)
    model = nnx.bridge.ToNNX(build(name), rngs=nnx.Rngs(0, dropout=1))
    nnx.bridge.lazy_init(model, x)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            out = model(x, train=True, mutable=['batch_stats', 'spectral'])
            return jnp.square(joined(out)).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    first = step(model, optimizer, x)
    assert np.isfinite(first)
    if jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert step(model, optimizer, x) != first
