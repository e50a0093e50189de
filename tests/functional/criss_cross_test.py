import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attention_jax
from attention_jax.functional import cost, criss_cross_attend, criss_cross_weights
from tests import helpers


def reading(q, k, v):
    """Position by position, the entries of its lines one after the other."""
    spatial = q.shape[1:-1]
    weights = np.zeros((*q.shape[:-1], sum(spatial)))
    y = np.zeros((*q.shape[:-1], v.shape[-1]))
    for place in np.ndindex(q.shape[:-1]):
        keys, values = [], []
        for axis, side in enumerate(spatial, 1):
            for entry in range(side):
                other = (*place[:axis], entry, *place[axis + 1 :])
                own = entry == place[axis] and axis < len(spatial)
                keys.append(-np.inf if own else k[other] @ q[place])
                values.append(v[other])
        p = np.exp(np.array(keys) - max(keys))
        weights[place] = p / p.sum()
        y[place] = weights[place] @ np.array(values)
    return y, weights


def arrays(spatial, d=2, e=3, batch=2, dtype=np.float64):
    return [
        jnp.asarray(helpers.array((batch, *spatial, width), seed), dtype)
        for seed, width in enumerate((d, d, e))
    ]


def masked(q, k, v):
    """Attention between all positions with all logits off the lines taken out."""
    spatial = q.shape[1:-1]
    place = np.indices(spatial).reshape(len(spatial), -1)
    crosses = (place[:, :, None] != place[:, None, :]).sum(0) <= 1
    q, k, rows = (y.reshape(len(y), -1, y.shape[-1]) for y in (q, k, v))
    s = jnp.where(crosses[None], q @ k.swapaxes(1, 2), -jnp.inf)
    return (jax.nn.softmax(s, -1) @ rows).reshape(v.shape)


@pytest.mark.parametrize('spatial', [(3, 4), (4, 1), (1, 1), (2, 3, 4), (1, 3, 1)])
def test_equation_and_gradients(x64, spatial):
    q, k, v = arrays(spatial)
    run = functools.partial(criss_cross_attend, spatial_dims=len(spatial))
    y, weights = reading(*map(np.asarray, (q, k, v)))

    @jax.jit
    def both(*operands):
        gradients = [
            jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2))(*operands)
            for f in (run, masked)
        ]
        weights = criss_cross_weights(*operands[:2], spatial_dims=len(spatial))
        return (run(*operands), weights), *gradients

    values, got, want = both(q, k, v)
    jax.tree.map(helpers.assert_close, values, (y, weights))
    jax.tree.map(helpers.assert_close, got, want)


@settings(deadline=None, max_examples=8)
@given(
    sides=st.tuples(st.integers(1, 3), st.sampled_from([1, 4])),
    batch=st.sampled_from([(), (2, 1)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_turning_the_map_and_shuffling_its_lines(sides, batch, dtype, seed):
    """The lines through a position are the same for a turned map, in any order, in any batch."""
    random = np.random.default_rng(seed)
    operands = [jnp.asarray(random.normal(size=(*batch, *sides, c)), dtype) for c in (2, 2, 3)]
    rows, columns = (random.permutation(side) for side in sides)

    @jax.jit
    def run(operands, rows, columns):
        def turn(a):
            return a.swapaxes(-3, -2)

        def shuffle(a):
            return a[..., rows[:, None], columns[None], :]

        y = criss_cross_attend(*operands)
        turned = criss_cross_attend(*map(turn, operands))
        shuffled = criss_cross_attend(*map(shuffle, operands))
        return (y, turn(turned)), (shuffle(y), shuffled), criss_cross_weights(*operands[:2]).sum(-1)

    turned, shuffled, sums = run(operands, rows, columns)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    for got, want in (turned, shuffled):
        assert got.dtype == want.dtype == dtype
        helpers.assert_close(got, want, tolerance)
    helpers.assert_close(sums, np.ones(sums.shape), tolerance)


def test_float32_inside_and_large_logits():
    """Logits of bfloat16 features are not rounded, and those of 1e6 do not overflow."""
    q = jnp.full((1, 2, 2, 1), 16, jnp.bfloat16)
    k = jnp.asarray([[16, 16.125], [16, 16]], jnp.bfloat16)[None, ..., None]  # logits 256, 258
    weights = jax.jit(criss_cross_weights)(q, k)
    np.testing.assert_allclose(float(weights[0, 0, 0, 3]), np.exp(2) / (np.exp(2) + 2), rtol=0.01)
    huge = [a * 1e3 for a in arrays((3, 4), dtype=np.float32)]
    grad = jax.value_and_grad(lambda *a: criss_cross_attend(*a).sum(), (0, 1, 2))
    value, gradients = jax.jit(grad)(*huge)
    assert all(np.isfinite(leaf).all() for leaf in (value, *gradients))


def test_forward_mode(x64):
    q, k, v = arrays((3, 4))
    tangent, step = helpers.array(q.shape, 7), 1e-6
    f = jax.jit(lambda q: criss_cross_attend(q, k, v))
    slope = jax.jit(lambda q, t: jax.jvp(f, (q,), (t,))[1])(q, tangent)
    numeric = (f(q + step * tangent) - f(q - step * tangent)) / (2 * step)
    helpers.assert_close(slope, numeric, 1e-8)


def test_no_device_gathers_the_batch():
    operands = arrays((3, 4), batch=8, dtype=np.float32)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec('data'))
    grad = jax.grad(lambda *a: jnp.sin(criss_cross_attend(*a)).sum(), (0, 1, 2))
    with jax.set_mesh(mesh):
        program = jax.jit(grad, in_shardings=split, out_shardings=split).lower(*operands)
    text = program.compile().as_text()
    assert not [name for name in ('all-gather', 'all-to-all', 'gather(') if name in text]


def test_cost():
    shapes = [jax.ShapeDtypeStruct((2, 3, 5, c), jnp.float32) for c in (4, 4, 7)]
    with cost.tally() as counts:
        jax.eval_shape(criss_cross_attend, *shapes)
    assert counts == {'macs': 0, 'matmul': 2 * 15 * 8 * 11}


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        ({'query': jnp.zeros((3, 4))}, 'query'),
        ({'key': jnp.zeros((2, 4, 3, 2))}, 'key'),
        ({'value': jnp.zeros((2, 4, 3, 5))}, 'value'),
        ({'spatial_dims': 1}, 'spatial_dims'),
        ({'query': jnp.zeros((2, 3, 4, 2), int)}, 'query'),
    ],
)
def test_bad_arguments_are_named(change, word):
    arguments = {name: jnp.zeros((2, 3, 4, 2)) for name in ('query', 'key', 'value')}
    with pytest.raises(ValueError, match=word):
        criss_cross_attend(**{**arguments, **change})


def test_memory_of_the_program():
    """Two arrays of weights, 64 MiB each, and not many more in forward and gradient together."""
    shapes = [jax.ShapeDtypeStruct((256, 256, 64), jnp.float32)] * 3
    step = jax.jit(jax.grad(lambda *a: jnp.sin(criss_cross_attend(*a)).sum(), (0, 1, 2)))
    temporary = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 512 * 2**20


PEAK = """
import resource
import jax, jax.numpy as jnp
from attention_jax import create_attention
from attention_jax.functional import criss_cross_attend
keys = jax.random.split(jax.random.key(0), 3)
operands = [jax.random.normal(key, (1, 256, 256, 64)) for key in keys]
module = create_attention('criss_cross')
params = {'params': jax.tree.map(jnp.ones_like, module.init(keys[0], operands[0][:, :8])['params'])}
steps = {
    'function': (lambda *a: jnp.sin(criss_cross_attend(*a)).sum(), operands),
    'module': (lambda p, x: jnp.sin(module.apply(p, x / 64)).sum(), (params, operands[0])),
}
jax.block_until_ready((operands, params))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (loss, inputs) in steps.items():
    step = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs)))))
    result = jax.block_until_ready(step(*inputs))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in kilobytes on Linux')
def test_peak_memory_in_a_process():
    """A 256x256 map of 64 channels, forward and backward, under 2 GiB: the products alone, and the
    module with its two passes."""
    root = str(pathlib.Path(attention_jax.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, '-c', PEAK],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peaks = [float(line) for line in result.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) < 2, peaks
