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

from attention_jax.functional import (
    additive_attend,
    attend,
    attention_chunks,
    attention_kernels,
    attention_weights,
    cost,
    dot_product,
    pairwise_relu_attend,
)
from tests import helpers

COMBINATIONS = [
    (similarity, weighting)
    for similarity in dot_product.SIMILARITIES
    for weighting in dot_product.WEIGHTINGS
    if (similarity, weighting) != ('gaussian', 'sigmoid')
]


def weights(xp, q, k, bias, relative, similarity, weighting, scale):
    """P by its definition, all pairs of vectors side by side."""
    d = q.shape[-1]
    if similarity == 'cosine':
        q, k = (x / xp.maximum(xp.sqrt((x**2).sum(-1, keepdims=True)), 1e-12) for x in (q, k))
    a, b = q[..., :, None, :], k[..., None, :, :]
    if similarity == 'gaussian':
        s = -0.5 * (1.0 if scale is None else scale) * ((a - b) ** 2).sum(-1)
    else:
        s = (a * b).sum(-1) * (d**-0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias[..., None, :]
    if relative is not None:
        h, w = relative[0].shape[-1], relative[1].shape[-1]
        s = s + xp.repeat(relative[0], w, -1) + xp.tile(relative[1], (1,) * (s.ndim - 1) + (h,))
    if weighting == 'softmax':
        p = xp.exp(s - s.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)
    if weighting == 'sigmoid':
        return 1 / (1 + xp.exp(-s))
    p = xp.exp(s) if similarity == 'gaussian' else s
    return p / k.shape[-2] if weighting == 'mean' else p


def arrays(batch=(2,), n=5, grid=(2, 3), d=3, e=4, dtype=np.float64):
    """query, key, value, bias, relative."""
    m = grid[0] * grid[1]
    shapes = ((n, d), (m, d), (m, e), (m,), (n, grid[0]), (n, grid[1]))
    q, k, v, bias, rows, columns = (
        jnp.asarray(helpers.array((*batch, *shape), seed), dtype)
        for seed, shape in enumerate(shapes)
    )
    return q, k, v, bias, (rows, columns)


def close(got, want, tolerance=1e-9):
    jax.tree.map(lambda g, w: helpers.assert_close(g, w, tolerance), got, want)


@pytest.mark.parametrize('extras', [(), ('bias', 'relative')], ids=['bare', 'bias_relative'])
@pytest.mark.parametrize(('similarity', 'weighting'), COMBINATIONS)
def test_equation_and_gradients(x64, similarity, weighting, extras):
    """Plain, chunked and both orders of multiplication against the naive form."""
    given_scale = 0.7 if extras else None
    options = {'similarity': similarity, 'weighting': weighting, 'scale': given_scale}
    few_keys = {'n': 3, 'grid': (1, 2), 'd': 6, 'e': 5}  # multiplied in the other order
    linear = weighting in ('mean', 'none') and similarity != 'gaussian'
    for sizes in ({}, few_keys) if linear else ({},):
        q, k, v, bias, relative = arrays(**sizes)
        bias = bias if 'bias' in extras else None
        relative = relative if 'relative' in extras else None
        cotangent = helpers.array((*q.shape[:-1], v.shape[-1]), 9)

        def naive(q, k, v, bias, relative):
            return weights(jnp, q, k, bias, relative, **options) @ v

        def ours(q, k, v, bias, relative, chunk):
            return attend(q, k, v, bias=bias, relative=relative, chunk_size=chunk, **options)

        @jax.jit
        def both(*operands, naive=naive, ours=ours, cotangent=cotangent):
            def run(f):
                return jax.value_and_grad(lambda *a: (f(*a) * cotangent).sum(), range(5))(*operands)

            return run(naive), [run(functools.partial(ours, chunk=c)) for c in (None, 1, 2)]

        operands = (q, k, v, bias, relative)
        want, results = both(*operands)
        for got in results:
            close(got, want)
        p = weights(np, *jax.tree.map(np.asarray, (q, k, bias, relative)), **options)
        close(attend(q, k, v, bias=bias, relative=relative, **options), p @ np.asarray(v))
        close(attention_weights(q, k, bias=bias, relative=relative, **options), p)


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 7),
    chunk=st.integers(1, 9),
    weighting=st.sampled_from(['softmax', 'sigmoid']),
)
def test_any_chunk_gives_the_plain_form(n, m, chunk, weighting):
    q, k, v, bias, _ = arrays(batch=(), n=n, grid=(1, m), dtype=np.float32)

    @jax.jit
    def both(*operands):
        def run(chunk):
            def loss(q, k, v, bias):
                y = attend(q, k, v, bias=bias, weighting=weighting, chunk_size=chunk)
                return jnp.sin(y).sum()

            return jax.value_and_grad(loss, range(4))(*operands)

        return run(chunk), run(n)

    close(*both(q, k, v, bias), 3e-5)


def test_chunks_of_their_own_choice(x64, monkeypatch):
    """None chooses the plain form below the bound and chunks above it, with the same numbers."""
    q, k, v, _, _ = arrays(batch=(2, 2), n=70, grid=(4, 5))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(bound, *operands):
        monkeypatch.setattr(dot_product, '_PLAIN_SCORES', bound)
        return jax.grad(lambda *a: jnp.sin(attend(*a)).sum(), (0, 1, 2))(*operands)

    plain, chunked = gradients(1400, q, k, v), gradients(1399, q, k, v)
    close(chunked, plain)
    assert 'while' not in gradients.lower(1400, q, k, v).as_text()
    assert 'while' in gradients.lower(1399, q, k, v).as_text()
    for batch, n, m in ((1, 65536, 65536), (8, 3136, 784), (512, 4096, 4096), (1, 2_000_000, 1)):
        assert batch * m * attention_chunks.chunk_size(batch, n, m) <= max(2**22, 32 * batch * m)


@pytest.mark.parametrize('chunk', [None, 2])
def test_softmax_symmetries(x64, chunk):
    q, k, v, bias, _ = arrays()
    y = attend(q, k, v, bias=bias, chunk_size=chunk)
    close(attend(q, k, v, bias=bias + 50.0, chunk_size=chunk), y, 1e-12)
    order = np.random.default_rng(0).permutation(k.shape[-2])
    mixed = attend(q, k[:, order], v[:, order], bias=bias[:, order], chunk_size=chunk)
    close(mixed, y, 1e-12)
    shift = k + helpers.array((2, 1, 3), 5)  # moves each row of logits by a constant
    close(attend(q, shift, v, bias=bias, chunk_size=chunk), y, 1e-12)


@pytest.mark.parametrize('chunk', [None, 2])
def test_minus_infinity_takes_keys_out(x64, chunk):
    q, k, v, _, _ = arrays()
    mask = jnp.where(jnp.arange(6) < 4, 0.0, -jnp.inf)
    y = attend(q, k, v, bias=mask, chunk_size=chunk)
    close(y, attend(q, k[:, :4], v[:, :4]), 1e-12)

    def loss(q, k, v):
        return attend(q, k, v, bias=jnp.full(6, -jnp.inf), chunk_size=chunk).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert value == 0
    assert all(not np.any(g) for g in gradients)


@pytest.mark.parametrize('chunk', [None, 2])
def test_batch_axes_and_vmap(x64, chunk):
    q, k, v, _, _ = arrays(batch=(2, 3))
    run = jax.jit(functools.partial(attend, chunk_size=chunk))
    y = run(q, k, v)
    close(jax.vmap(jax.vmap(run))(q, k, v), y, 1e-12)
    close(run(q, k[0, 0], v[0, 0])[0, 0], y[0, 0], 1e-12)  # one set of keys for all


@pytest.mark.parametrize('similarity', dot_product.SIMILARITIES)
def test_learned_scale(x64, similarity):
    q, k, v, _, _ = arrays()

    @jax.jit
    def run(scale):
        def loss(scale):
            return jnp.sin(attend(q, k, v, similarity=similarity, scale=scale, chunk_size=2)).sum()

        step = 1e-5
        slope = (loss(scale + step) - loss(scale - step)) / (2 * step)
        return loss(scale), loss(0.8), jax.grad(loss)(scale), slope

    value, fixed, gradient, slope = run(jnp.asarray(0.8))
    close(value, fixed, 1e-12)
    close(gradient, slope, 1e-8)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(('similarity', 'weighting'), COMBINATIONS)
def test_numerics(similarity, weighting, dtype):
    q, k, v, _, _ = arrays(dtype=dtype)

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            ys = [
                attend(q, k, v, similarity=similarity, weighting=weighting, chunk_size=chunk)
                for chunk in (5, 2)
            ]
            assert all(y.dtype == dtype for y in ys)
            return sum(y.astype(jnp.float32).sum() for y in ys)

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    for scale in (1e3, 1e-3, 0.0):
        result = run(q * scale, k * scale, v * scale)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))
    same = run(*[jnp.full_like(x, 3.0) for x in (q, k, v)])
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(same))


@pytest.mark.parametrize('chunk', [None, 16])
def test_bfloat16_is_near_float32(chunk):
    q, k, v, _, _ = arrays(n=64, grid=(8, 8), d=16, e=16, dtype=np.float32)

    def gradients(*operands):
        return jax.grad(lambda *a: jnp.sin(attend(*a, chunk_size=chunk)).sum(), (0, 1, 2))(
            *operands
        )

    half = gradients(*[x.astype(jnp.bfloat16) for x in (q, k, v)])
    close(half, gradients(q, k, v), 0.03)


def test_distant_gaussian_keeps_its_digits():
    """|q|^2 - 2 q.k + |k|^2 in float32 would lose them all far from the origin."""
    q, k, v, _, _ = arrays(dtype=np.float32)
    near = attend(q, k, v, similarity='gaussian', weighting='mean')
    far = attend(q + 1024, k + 1024, v, similarity='gaussian', weighting='mean')
    close(far, near, 2e-3)


def test_forward_mode_through_the_plain_form_only(x64):
    q, k, v, _, _ = arrays(batch=())
    tangent = helpers.array(q.shape, 7)
    step = 1e-6
    f = jax.jit(lambda q: attend(q, k, v))
    slope = jax.jit(lambda q, t: jax.jvp(f, (q,), (t,))[1])(q, tangent)
    close(slope, (f(q + step * tangent) - f(q - step * tangent)) / (2 * step), 1e-8)
    with pytest.raises(TypeError, match='forward-mode'):
        jax.jvp(lambda q: attend(q, k, v, chunk_size=2), (q,), (jnp.asarray(tangent),))


def per_device(f, *operands):
    """f and its gradient compiled with the first axis over eight devices: results and program."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec('data'))
    operands = jax.device_put(operands, split)
    run = jax.jit(
        jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), range(len(operands))),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), split),
    )
    with jax.set_mesh(mesh):
        return run(*operands), run.lower(*operands).compile().as_text()


@pytest.mark.parametrize(
    ('f', 'rank'),
    [
        (functools.partial(attend, chunk_size=2), 2),
        (functools.partial(attend, weighting='mean'), 2),
        (lambda q, k, v: additive_attend(q, k, v, jnp.ones(3), chunk_size=2), 2),
        (pairwise_relu_attend, 1),
    ],
    ids=['chunked', 'mean', 'additive', 'pairwise'],
)
def test_no_device_gathers_the_batch(f, rank):
    q, k, v, _, _ = arrays(batch=(8, 2), dtype=np.float32)
    q, k = (q, k) if rank == 2 else (q[..., 0], k[..., 0])
    got, program = per_device(f, q, k, v)
    assert 'all-gather' not in program
    assert 'all-to-all' not in program
    want = jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))(q, k, v)
    close(got, want, 1e-5)


def test_cost_is_that_of_what_is_multiplied():
    def count(n, m, d, e, **options):
        shapes = [jax.ShapeDtypeStruct((2, *s), jnp.float32) for s in ((n, d), (m, d), (m, e))]
        with cost.tally() as counts:
            jax.eval_shape(lambda *a: attend(*a, **options), *shapes)
        return counts['matmul']

    assert count(784, 196, 256, 256) == 2 * 784 * 196 * 512
    assert count(3136, 784, 16, 32, chunk_size=64) == 2 * 3136 * 784 * 48
    assert count(784, 196, 16, 32, weighting='mean') == 2 * (784 + 196) * 16 * 32
    assert count(784, 2, 16, 32, weighting='none') == 2 * 784 * 2 * 48
    # Five blocks of the non-local ResNet-50 at 224: two on 28x28, three on 14x14, keys pooled.
    blocks = 2 * count(784, 196, 256, 256) + 3 * count(196, 49, 512, 512)
    assert blocks == 2 * 186_855_424


def test_memory_of_the_program_is_linear():
    """n m float32 scores would be 1 GiB, forward and again backward."""
    n = 16_384
    shapes = [jax.ShapeDtypeStruct((n, 64), jnp.float32)] * 3
    step = jax.jit(jax.grad(lambda *a: jnp.sin(attend(*a)).sum(), (0, 1, 2)))
    temporary = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 160 * 2**20


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from attention_jax.functional import attend
keys = jax.random.split(jax.random.key(0), 3)
operands = [jax.random.normal(key, (int(sys.argv[1]), 64)) for key in keys]
jax.block_until_ready(operands)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step = jax.jit(jax.value_and_grad(lambda *a: jnp.sin(attend(*a)).sum(), (0, 1, 2)))
value, gradients = jax.block_until_ready(step(*operands))
assert all(bool(jnp.isfinite(g).all()) for g in gradients)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss is in kilobytes on Linux')
@pytest.mark.parametrize('n', [16_384, 65_536])
def test_peak_memory_in_a_process(n):
    """All positions of a 256x256 map attend to each other, forward and backward, under 1.5 GiB."""
    root = str(pathlib.Path(dot_product.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, '-c', PEAK, str(n)],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(result.stdout) < 1.5


def kernel_shapes(n=2048, m=1500, d=64, dtype=jnp.bfloat16, batch=(2,)):
    return [jax.ShapeDtypeStruct((*batch, s, d), dtype) for s in (n, m, m)]


def lowered(f, shapes, platform):
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_the_kernel_is_in_programs_for_a_tpu_only():
    step = jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2))
    assert 'tpu_custom_call' in lowered(step, kernel_shapes(), 'tpu')
    assert 'custom_call' not in lowered(step, kernel_shapes(), 'cpu')
    for other in (
        kernel_shapes(n=512, m=512),  # small: plain
        kernel_shapes(dtype=jnp.float16),
        kernel_shapes(d=20),
    ):
        assert 'tpu_custom_call' not in lowered(step, other, 'tpu')
    biased = functools.partial(attend, bias=jnp.zeros(1500))
    assert 'tpu_custom_call' not in lowered(biased, kernel_shapes(), 'tpu')
    sigmoid = functools.partial(attend, weighting='sigmoid')
    assert 'tpu_custom_call' not in lowered(sigmoid, kernel_shapes(), 'tpu')


def test_the_kernel_runs_on_each_device_s_part():
    """The partitioner cannot split it: under a mesh each device calls it on its own examples."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        program = lowered(attend, kernel_shapes(batch=(16, 2)), 'tpu')
    (call,) = [line for line in program.splitlines() if 'tpu_custom_call' in line]
    assert 'tensor<4x1x2048x64xbf16>' in call


@pytest.mark.parametrize(('n', 'm'), [(128, 256), (200, 130)])
def test_the_kernel_interpreted(n, m, monkeypatch):
    """Filling up to whole tiles and masking, with several tiles."""
    from jax.experimental.pallas import tpu as pltpu

    monkeypatch.setattr(attention_kernels, '_PALLAS_BLOCK', 128)
    q, k, v, _, _ = arrays(batch=(1,), n=n, grid=(1, m), d=16, e=16, dtype=np.float32)

    def run(implementation):
        def loss(*operands):
            return jnp.sin(attend(*operands, implementation=implementation)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        got = run('pallas')
    close(got, run('xla'), 1e-5)


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        ({'similarity': 'l2'}, 'similarity'),
        ({'weighting': 'max'}, 'weighting'),
        ({'weighting': 'sigmoid', 'similarity': 'gaussian'}, 'sigmoid'),
        ({'chunk_size': 0}, 'chunk_size'),
        ({'implementation': 'triton'}, 'implementation'),
        ({'implementation': 'cudnn'}, 'gpu'),
        ({'implementation': 'pallas', 'weighting': 'sigmoid'}, 'softmax'),
        ({'implementation': 'pallas'}, 'same width'),
        ({'query': jnp.zeros(3)}, 'query'),
        ({'key': jnp.zeros((6, 2))}, 'key'),
        ({'value': jnp.zeros((5, 4))}, 'value'),
        ({'key': jnp.zeros((0, 3)), 'value': jnp.zeros((0, 4))}, 'keys'),
        ({'query': jnp.zeros((2, 5, 3)), 'key': jnp.zeros((3, 6, 3))}, 'leading axes'),
        ({'bias': jnp.zeros(5)}, 'bias'),
        ({'relative': (jnp.zeros((5, 2)), jnp.zeros((5, 2)))}, 'relative'),
        ({'scale': jnp.zeros(2)}, 'scale'),
    ],
)
def test_bad_arguments_are_named(change, word):
    arguments = {'query': jnp.zeros((5, 3)), 'key': jnp.zeros((6, 3)), 'value': jnp.zeros((6, 4))}
    with pytest.raises(ValueError, match=word):
        attend(**{**arguments, **change})


@pytest.mark.parametrize('activation', ['tanh', 'relu'])
@pytest.mark.parametrize('weighting', dot_product.WEIGHTINGS)
def test_additive(x64, activation, weighting):
    q, k, v, _, _ = arrays()
    w = jnp.asarray(helpers.array((3,), 8))

    def naive(q, k, v, w):
        z = q[..., :, None, :] + k[..., None, :, :]
        s = (jnp.tanh(z) if activation == 'tanh' else jax.nn.relu(z)) @ w
        if weighting == 'softmax':
            p = jax.nn.softmax(s, -1)
        elif weighting == 'sigmoid':
            p = jax.nn.sigmoid(s)
        else:
            p = s / 6 if weighting == 'mean' else s
        return p @ v

    @jax.jit
    def both(*operands):
        def run(f):
            return jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), range(4))(*operands)

        ours = functools.partial(additive_attend, activation=activation, weighting=weighting)
        return run(naive), [run(functools.partial(ours, chunk_size=c)) for c in (None, 2)]

    want, results = both(q, k, v, w)
    for got in results:
        close(got, want)


def test_additive_errors():
    q, k, v, w = jnp.zeros((5, 3)), jnp.zeros((6, 3)), jnp.zeros((6, 4)), jnp.zeros(3)
    with pytest.raises(ValueError, match='weight'):
        additive_attend(q, k, v, jnp.zeros(4))
    with pytest.raises(ValueError, match='activation'):
        additive_attend(q, k, v, w, activation='gelu')
    with pytest.raises(ValueError, match='weighting'):
        additive_attend(q, k, v, w, weighting='max')
    with pytest.raises(ValueError, match='chunk_size'):
        additive_attend(q, k, v, w, chunk_size=0)


def pairwise(a, b, v):
    return jax.nn.relu(a[..., :, None] + b[..., None, :]) @ v / b.shape[-1]


@pytest.mark.parametrize(('n', 'm'), [(1, 1), (6, 1), (5, 7)])
def test_pairwise_relu_with_ties(n, m):
    """Whole numbers make many sums exactly 0, which must count as off in the gradients too."""

    @jax.jit
    def both(a, b, v):
        def run(f):
            return jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))(a, b, v)

        return run(pairwise_relu_attend), run(pairwise)

    for seed in range(5):
        a, b = (np.round(2 * helpers.array((s,), seed + s)).astype(np.float32) for s in (n, m))
        close(*both(a, b, helpers.array((m, 3), seed, np.float32)), 2e-5)


def test_pairwise_relu_exact_and_batched(x64):
    a, b = jnp.asarray(helpers.array((2, 3, 11), 1)), jnp.asarray(helpers.array((2, 3, 7), 2))
    v = jnp.asarray(helpers.array((2, 3, 7, 4), 3))

    def run(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2)))(a, b, v)

    want = run(pairwise)
    close(run(pairwise_relu_attend), want)
    close(run(jax.vmap(jax.vmap(pairwise_relu_attend))), want)


@pytest.mark.parametrize('offset', [0.0, 100.0])
def test_pairwise_relu_keeps_its_digits(offset):
    """Float32 at a realistic size, also far from 0, where the sum cancels the offset."""
    n = 3136
    a, b = helpers.array((n,), 1) - offset, helpers.array((n,), 2) + offset
    a, b = a.astype(np.float32), b.astype(np.float32)
    v = helpers.array((n, 2), 3, np.float32)
    exact = np.maximum(np.float64(a)[:, None] + np.float64(b), 0) @ np.float64(v) / n
    error = np.abs(pairwise_relu_attend(a, b, v) - exact).max() / np.abs(exact).max()
    assert error < 2e-5


def test_pairwise_relu_errors():
    with pytest.raises(ValueError, match='same m'):
        pairwise_relu_attend(jnp.zeros(5), jnp.zeros(6), jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match='leading axes'):
        pairwise_relu_attend(jnp.zeros((2, 5)), jnp.zeros((3, 6)), jnp.zeros((6, 2)))
