"""Pools against loops that spell out PyTorch's rules, gradients against loops and plain forms."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax.functional import (
    adaptive_avg_pool,
    avg_pool,
    axis_mean_and_max,
    channel_mean_and_max,
    max_pool,
    spatial_mean,
    spatial_mean_and_max,
)
from tests import helpers

module = importlib.import_module('attention_jax.functional.pooling')


def torch_sizes(spatial, window, strides, padding, ceil_mode):
    """Output sizes: in ceil mode a last window that would start in the high padding is dropped."""
    sizes = []
    for n, k, s, p in zip(spatial, window, strides, padding, strict=True):
        size = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (size - 1) * s >= n + p:
            size -= 1
        sizes.append(size)
    return sizes


def loops(x, window, strides, padding, ceil_mode, count_padding=True):
    """Maximum, mean and the positions (first maximum) that each maximum came from, x [b, *s, c]."""
    x = np.asarray(x, np.float64)
    spatial = x.shape[1:-1]
    out = torch_sizes(spatial, window, strides, padding, ceil_mode)
    top = np.full((x.shape[0], *out, x.shape[-1]), -np.inf)
    mean, source = np.zeros_like(top), np.zeros((*top.shape, len(spatial)), int)
    for place in itertools.product(*map(range, out)):
        start = [p * s - q for p, s, q in zip(place, strides, padding, strict=True)]
        end = [
            min(a + k, n + q) for a, k, n, q in zip(start, window, spatial, padding, strict=True)
        ]
        size = np.prod([e - a for a, e in zip(start, end, strict=True)])
        inside = [range(max(a, 0), min(e, n)) for a, e, n in zip(start, end, spatial, strict=True)]
        if not count_padding:
            size = np.prod([len(r) for r in inside])
        for b, c in itertools.product(range(x.shape[0]), range(x.shape[-1])):
            for at in itertools.product(*inside):
                value = x[(b, *at, c)]
                mean[(b, *place, c)] += value / size
                if value > top[(b, *place, c)]:
                    top[(b, *place, c)] = value
                    source[(b, *place, c)] = at
    return top, mean, source


def scatter(g, source, shape):
    """The gradient of the maximum: each output's cotangent to the position it came from."""
    dx = np.zeros(shape)
    for index in np.ndindex(*g.shape):
        dx[(index[0], *source[index], index[-1])] += g[index]
    return dx


def integers(shape, dtype=np.float64, high=4, seed=0):
    """Few distinct numbers, so that windows are full of ties."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), dtype)


# x, window, strides, padding, ceil_mode
CASES = {
    '3x3/2': ((2, 7, 8, 3), (3, 3), (2, 2), (1, 1), False),
    '3x3/2 ceil': ((1, 6, 7, 2), (3, 3), (2, 2), (0, 1), True),
    '2x2/2': ((2, 6, 4, 2), (2, 2), (2, 2), (0, 0), False),
    '2x2/2 odd, ceil': ((1, 5, 7, 2), (2, 2), (2, 2), (0, 0), True),
    'last window dropped': ((1, 5, 5, 2), (2, 2), (3, 3), (1, 1), True),
    '3x2/1': ((1, 6, 5, 2), (3, 2), (1, 1), (1, 1), False),
    '5x5/1': ((1, 7, 6, 2), (5, 5), (1, 1), (2, 2), False),
    '4x4/3': ((1, 9, 8, 1), (4, 4), (3, 3), (1, 2), True),
    '6x6/6': ((1, 12, 6, 2), (6, 6), (6, 6), (0, 0), False),
    '14x14/1': ((1, 15, 14, 1), (14, 14), (1, 1), (0, 0), False),
    'rows unseen': ((1, 8, 9, 2), (2, 2), (3, 4), (0, 0), False),
    'smaller than its window': ((1, 2, 3, 2), (3, 3), (2, 2), (0, 0), True),
    '1d': ((2, 9, 2), (3,), (2,), (1,), True),
    '3d': ((1, 4, 5, 3, 2), (2, 3, 2), (1, 2, 1), (1, 1, 0), False),
}


@pytest.mark.parametrize('name', CASES)
def test_pools(name, x64):
    shape, window, strides, padding, ceil_mode = CASES[name]
    x = integers(shape)
    options = {'strides': strides, 'padding': padding, 'ceil_mode': ceil_mode}
    top, mean, source = loops(x, window, strides, padding, ceil_mode)
    _, inner_mean, _ = loops(x, window, strides, padding, ceil_mode, count_padding=False)
    g = integers(top.shape, high=9, seed=1)
    checked = module._windows(x, window, strides, padding, ceil_mode)
    tpu = {'window': window, 'strides': strides, 'pads': module._cover(shape[1:-1], *checked)}

    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def run(x, g):
        y, back = jax.vjp(lambda x: max_pool(x, window, **options), x)
        on_tpu, tpu_back = jax.vjp(lambda x: module._window_max(x, **tpu), x)
        means = avg_pool(x, window, **options)
        inner, mean_back = jax.vjp(lambda x: avg_pool(x, window, **options, count_padding=False), x)
        return (y, on_tpu), (back(g)[0], tpu_back(g)[0]), means, inner, mean_back(g)[0]

    tops, gradients, means, inner, mean_gradient = run(x, g)
    for y, gradient in zip(tops, gradients, strict=True):
        np.testing.assert_array_equal(y, top)
        np.testing.assert_array_equal(gradient, scatter(g, source, shape))
    np.testing.assert_allclose(means, mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(inner, inner_mean, rtol=0, atol=1e-13)
    # The mean is linear: <g, pool(z)> = <gradient, z> for any z.
    z = np.random.default_rng(2).normal(size=shape)
    _, mean_z, _ = loops(z, window, strides, padding, ceil_mode, count_padding=False)
    np.testing.assert_allclose(np.vdot(g, mean_z), np.vdot(mean_gradient, z), rtol=0, atol=1e-11)


@given(
    size=st.integers(1, 9),
    window=st.integers(1, 5),
    strides=st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil_mode=st.booleans(),
    count_padding=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_any_options(size, window, strides, padding, ceil_mode, count_padding):
    x = integers((1, size, 2), np.float32)
    options = {'strides': strides, 'padding': padding, 'ceil_mode': ceil_mode}
    (out,) = torch_sizes((size,), (window,), (strides,), (padding,), ceil_mode)
    if padding >= window or out < 1:
        with pytest.raises(ValueError, match='window'):
            avg_pool(x, (window,), **options)
        return
    top, mean, _ = loops(x, (window,), (strides,), (padding,), ceil_mode, count_padding)
    np.testing.assert_array_equal(max_pool(x, (window,), **options), top)
    y = avg_pool(x, (window,), **options, count_padding=count_padding)
    np.testing.assert_allclose(y, mean, rtol=0, atol=1e-5)


def test_leading_axes_vmap_and_types():
    x = integers((2, 3, 6, 5, 2), np.float32)
    for pool in (max_pool, avg_pool):
        pool = jax.jit(functools.partial(pool, window=3, strides=2, padding=1))
        y = pool(x)
        assert y.shape == (2, 3, 3, 3, 2)
        np.testing.assert_array_equal(y[1, 2], pool(x[1, 2]))
        np.testing.assert_array_equal(y, jax.vmap(pool)(x))
        half = pool(x.astype(jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), y, rtol=2**-8)
    np.testing.assert_array_equal(max_pool(x.astype(jnp.int32), (2, 2)), max_pool(x, 2))
    assert avg_pool(x.astype(jnp.int32), 2).dtype == jnp.float32
    # A pair a side, and a sum that bfloat16 itself could not hold: 256 ones and one more.
    assert max_pool(x, (2, 2), padding=((1, 0), (0, 1))).shape == (2, 3, 3, 3, 2)
    ones = jnp.ones((1, 20, 20, 1), jnp.bfloat16)
    assert avg_pool(ones, 20)[0, 0, 0, 0] == 1


def test_adaptive_mean_over_its_bins(x64):
    """Bins that tile, overlap, repeat, or are the positions themselves; gradient by linearity."""
    x, (h, w) = helpers.array((2, 1, 6, 5, 3)), (6, 5)
    for size in [(3, 5), (4, 7), (9, 2), 1, (6, 5)]:
        rows, columns = (size, size) if isinstance(size, int) else size
        want = np.zeros((2, 1, rows, columns, 3))
        for i, j in np.ndindex(rows, columns):
            top, left = i * h // rows, j * w // columns
            bottom, right = -(-(i + 1) * h // rows), -(-(j + 1) * w // columns)
            want[:, :, i, j] = x[:, :, top:bottom, left:right].mean((2, 3))
        y, back = jax.vjp(lambda x, size=size: adaptive_avg_pool(x, size), jnp.asarray(x))
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-14)
        g = helpers.array(want.shape, 1)
        np.testing.assert_allclose(np.vdot(back(g)[0], x), np.vdot(g, want), rtol=1e-12)
    # A sum that bfloat16 itself could not hold.
    assert adaptive_avg_pool(jnp.ones((20, 20, 1), jnp.bfloat16), 1)[0, 0, 0] == 1
    with pytest.raises(ValueError, match='size'):
        adaptive_avg_pool(x, (0, 2))
    with pytest.raises(ValueError, match='x of adaptive_avg_pool'):
        adaptive_avg_pool(x[0, 0, 0], 2)


def test_maximum_passes_nan_on():
    x = integers((1, 6, 6, 1), np.float32).at[0, 2, 3].set(jnp.nan)
    for window, strides in [(3, 2), (3, 1), (2, 2)]:
        y = jax.jit(functools.partial(max_pool, window=window, strides=strides))(x)
        expected = module._window_max(
            x, window=(window,) * 2, strides=(strides,) * 2, pads=((0, 0), (0, 0))
        )
        np.testing.assert_array_equal(y, expected)
        assert jnp.isnan(y).any()


@pytest.mark.parametrize(
    ('function', 'axes'),
    [
        (spatial_mean_and_max, (-3, -2)),
        (channel_mean_and_max, (-1,)),
        (functools.partial(axis_mean_and_max, axis=-3), (-3,)),
        (functools.partial(axis_mean_and_max, axis=-2), (-2,)),
        (functools.partial(axis_mean_and_max, axis=-1), (-1,)),
    ],
)
@pytest.mark.parametrize('shape', [(2, 5, 4, 3), (4, 3, 6), (2, 2, 3, 4, 5)])
def test_mean_and_max(function, axes, shape, x64):
    """Ties share the gradient, as in jnp.max; what an accelerator runs is checked here too."""
    x = integers(shape)
    absolute = tuple(len(shape) + a for a in axes)

    def weighted(pair):
        return (pair[0] ** 2).sum() + (jnp.sin(pair[1]) * (1 + pair[0])).sum()

    @jax.jit
    def run(x):
        ours = function(x), jax.grad(lambda x: weighted(function(x)))(x)
        plain = lambda x: (jnp.mean(x, axes), jnp.max(x, axes))  # noqa: E731
        counted = module._one_pass_counted(x, absolute)
        return ours, (plain(x), jax.grad(lambda x: weighted(plain(x)))(x)), (
            module._one_pass(x, absolute), counted, module._two_passes_counted(x, absolute)
        )  # fmt: skip

    ours, theirs, (one, counted, two) = run(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), counted, two)
    jax.tree.map(np.testing.assert_array_equal, one, counted[:2])
    np.testing.assert_array_equal(counted[2], (x == x.max(axes, keepdims=True)).sum(axes))


def test_statistics_are_float32():
    """A mean that bfloat16 sums could not hold, and the gradient back in bfloat16."""
    x = jnp.full((2, 32, 32, 3), 1.0078125, jnp.bfloat16)
    assert spatial_mean(x).dtype == jnp.float32
    np.testing.assert_array_equal(spatial_mean(x), np.full((2, 3), 1.0078125, np.float32))
    for function in map(jax.jit, (spatial_mean_and_max, channel_mean_and_max)):
        mean, top = function(x)
        assert mean.dtype == top.dtype == jnp.float32
        np.testing.assert_allclose(mean, 1.0078125, rtol=1e-6)
        mapped = jax.vmap(function)(x)
        np.testing.assert_array_equal(mapped[1], top)
        gradient = jax.grad(lambda x, f=function: sum(p.sum() for p in f(x)))(x)
        assert gradient.dtype == jnp.bfloat16
        share = 2 * mean.size / x.size  # a mean's share, and as much for a maximum all hold
        np.testing.assert_allclose(gradient.astype(jnp.float32), share, rtol=2**-8)


def test_sharded_batch_is_not_gathered():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

    def loss(x):
        mean, top = spatial_mean_and_max(x)
        gates = channel_mean_and_max(x)
        x = x * (mean + top)[:, None, None] * (gates[0] * gates[1])[..., None]
        return (max_pool(x, 3, strides=2) + avg_pool(x, 3, strides=2)).sum()

    x = jax.ShapeDtypeStruct((8, 7, 7, 2), jnp.float32, sharding=split)
    text = (
        jax.jit(jax.value_and_grad(loss), out_shardings=(None, split)).lower(x).compile().as_text()
    )
    assert 'all-reduce' in text
    assert 'all-gather' not in text
    assert 'all-to-all' not in text


@pytest.mark.parametrize(
    ('window', 'options', 'message'),
    [
        (0, {}, 'window must be .* got 0'),
        ((1, 2, 3, 4), {}, 'window must have 1, 2 or 3 axes'),
        (2, {'strides': (1, 0)}, r'strides must be .* got \(1, 0\)'),
        (2, {'padding': 2}, r'padding must be less than window \(2, 2\).* got 2'),
        (2, {'padding': -1}, 'padding must be .* got -1'),
        (2, {'padding': (1, 1, 1)}, 'padding must be'),
        (6, {}, r'spatial size \(5, 4\) .* smaller than window \(6, 6\)'),
        ((2, 2, 2), {}, 'x must be .* 3 spatial axes'),
    ],
)
def test_errors(window, options, message):
    for pool in (max_pool, avg_pool):
        with pytest.raises(ValueError, match=message):
            pool(jnp.ones((5, 4, 2)), window, **options)


def test_global_errors():
    for function in (spatial_mean, spatial_mean_and_max, channel_mean_and_max):
        with pytest.raises(ValueError, match=rf'x of {function.__name__} .* got \(5, 4\)'):
            function(jnp.ones((5, 4)))
        with pytest.raises(ValueError, match='none of them 0'):
            function(jnp.ones((1, 0, 4, 2)))
    with pytest.raises(ValueError, match='axis 0 is unknown'):
        axis_mean_and_max(jnp.ones((1, 2, 4, 2)), 0)
