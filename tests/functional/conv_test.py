"""Convolutions against loops, their gradients against XLA's own, and what they do on a mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from attention_jax.functional import conv, conv_forms, cost, dense
from attention_jax.functional.sharding import per_example


def loops(x, kernel, strides, pads, dilation, groups):
    """The definition, one multiplication of numbers a channel pair and tap; x [b, *spatial, c]."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    window, (inputs, features) = kernel.shape[:-2], kernel.shape[-2:]
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(padded.shape[1:-1], window, strides, dilation, strict=True)
    ]
    y = np.zeros((x.shape[0], *out, features))
    for place in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, window)):
            at = tuple(
                p * s + t * d for p, s, t, d in zip(place, strides, tap, dilation, strict=True)
            )
            for o in range(features):
                first = o // (features // groups) * inputs
                seen = padded[(slice(None), *at, slice(first, first + inputs))]
                y[(slice(None), *place, o)] += seen @ kernel[(*tap, slice(None), o)]
    return y


def plain(x, kernel, strides, pads, dilation, groups):
    """XLA's own convolution, for gradients."""
    letters = 'DHW'[-len(strides) :]
    layout = (f'N{letters}C', f'{letters}IO', f'N{letters}C')
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=layout,
        feature_group_count=groups,
    )


def arrays(*shapes, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=s), dtype) for s in shapes]


def check(function, x, kernel, strides, pads, dilation, groups):
    """Values and gradients in float64, in one compiled program."""
    expected = loops(x, kernel, strides, pads, dilation, groups)
    (g,) = arrays(expected.shape, seed=1)

    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def both(x, kernel, g):
        y, back = jax.vjp(function, x, kernel)
        _, reference = jax.vjp(lambda *a: plain(*a, strides, pads, dilation, groups), x, kernel)
        return y, back(g), reference(g)

    y, ours, theirs = both(x, kernel, g)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


# name: x, kernel, strides, pads, dilation, groups
CASES = {
    'pointwise': ((2, 5, 4, 3), (1, 1, 3, 5), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    'pointwise strided': ((2, 5, 4, 3), (1, 1, 3, 5), (2, 3), ((0, 0), (0, 0)), (1, 1), 1),
    'pointwise padded': ((1, 3, 4, 3), (1, 1, 3, 2), (2, 1), ((1, 0), (1, 1)), (1, 1), 1),
    'pointwise 1d': ((2, 7, 3), (1, 3, 4), (2,), ((0, 0),), (1,), 1),
    'pointwise 3d': ((1, 3, 4, 5, 2), (1, 1, 1, 2, 3), (1, 2, 2), ((0, 0),) * 3, (1, 1, 1), 1),
    'dense': ((2, 6, 5, 3), (3, 2, 3, 4), (2, 1), ((1, 1), (0, 1)), (1, 2), 1),
    'dense 3d': (
        (1, 4, 5, 3, 2),
        (2, 3, 3, 2, 3),
        (1, 2, 1),
        ((0, 1), (1, 1), (1, 1)),
        (1,) * 3,
        1,
    ),
    'depthwise 3x3': ((2, 6, 5, 4), (3, 3, 1, 4), (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
    'depthwise uneven': ((1, 7, 6, 3), (2, 5, 1, 3), (1, 1), ((0, 3), (6, 1)), (2, 1), 3),
    'depthwise strided': ((2, 7, 6, 3), (3, 3, 1, 3), (2, 3), ((1, 1), (1, 0)), (1, 1), 3),
    'depthwise 1d': ((2, 8, 3), (3, 1, 3), (1,), ((1, 1),), (1,), 3),
    'depthwise many taps': ((1, 9, 9, 2), (1, 50, 1, 2), (1, 1), ((0, 0), (25, 24)), (1, 1), 2),
    'depthwise 3d': ((1, 3, 4, 3, 2), (2, 2, 2, 1, 2), (1, 1, 1), ((1, 0),) * 3, (1,) * 3, 2),
    'grouped': ((2, 5, 4, 8), (3, 3, 2, 8), (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
    'grouped o != c': ((1, 6, 5, 6), (3, 2, 2, 9), (2, 1), ((1, 0), (1, 1)), (1, 2), 3),
    'grouped wide': ((1, 4, 4, 40), (1, 1, 20, 4), (2, 1), ((0, 0), (0, 0)), (1, 1), 2),
    'multiplier': ((1, 3, 4, 24), (1, 3, 1, 48), (1, 1), ((0, 0), (1, 1)), (1, 1), 24),
    'grouped 1d': ((2, 7, 6), (3, 3, 4), (1,), ((1, 1),), (1,), 2),
    'grouped 3d': ((1, 3, 3, 4, 4), (2, 1, 3, 2, 2), (1, 1, 2), ((0, 0),) * 3, (1,) * 3, 2),
    'plane gate': ((2, 4, 6, 2), (7, 7, 2, 1), (1, 1), ((3, 3), (3, 3)), (1, 1), 1),
    'plane gate tall': ((2, 9, 6, 2), (5, 3, 2, 1), (1, 1), ((4, 4), (2, 2)), (2, 2), 1),
    'plane gate uneven': ((1, 5, 8, 1), (3, 4, 1, 1), (1, 1), ((0, 2), (3, 1)), (1, 2), 1),
    'plane strided': ((1, 7, 8, 2), (3, 3, 2, 1), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
}


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name, x64):
    x_shape, kernel_shape, strides, pads, dilation, groups = CASES[name]
    x, kernel = arrays(x_shape, kernel_shape)

    def ours(x, kernel):
        return conv(x, kernel, strides=strides, padding=pads, dilation=dilation, groups=groups)

    check(ours, x, kernel, strides, pads, dilation, groups)


@pytest.mark.parametrize('width', [4, 128])
def test_merged_groups_of_any_width(width, x64):
    """What a TPU runs is checked here too."""
    x, kernel = arrays((1, 5, 4, 12), (3, 3, 2, 18))
    settings = ((2, 1), ((1, 1), (1, 0)), (1, 1), 6)
    names = dict(zip(('strides', 'pads', 'dilation', 'groups'), settings, strict=True))
    merged = functools.partial(conv_forms.merged, **names, width=width, dense=conv_forms.plain)
    check(merged, x, kernel, *settings)


BLOCKED = {
    'strided, dilated': ((2, 9, 5, 3), (3, 2, 3, 4), (2, 1), ((1, 1), (0, 1)), (2, 1), 1),
    'stride 2': ((2, 9, 6, 3), (3, 2, 3, 4), (2, 2), ((1, 1), (2, 0)), (1, 1), 1),
    'rows of zeros alone': ((1, 3, 4, 2), (2, 2, 2, 3), (1, 2), ((5, 4), (3, 0)), (1, 2), 1),
    'rows that nobody reads': ((1, 8, 4, 2), (1, 2, 2, 3), (3, 1), ((0, 0), (0, 0)), (1, 1), 1),
    '1d': ((2, 9, 3), (4, 3, 2), (1,), ((2, 1),), (1,), 1),
    '3d': ((1, 4, 5, 3, 2), (2, 3, 3, 2, 3), (1, 2, 1), ((0, 1), (1, 1), (1, 1)), (1,) * 3, 1),
    'grouped': ((2, 6, 4, 8), (3, 3, 2, 8), (1, 1), ((1, 1), (1, 1)), (1, 1), 4),
}


@pytest.mark.parametrize('rows', [1, 2])
@pytest.mark.parametrize('name', BLOCKED)
def test_blocks_of_rows(name, rows, x64, monkeypatch):
    x_shape, kernel_shape, strides, pads, dilation, groups = BLOCKED[name]
    x, kernel = arrays(x_shape, kernel_shape)
    y = loops(x, kernel, strides, pads, dilation, groups)
    monkeypatch.setattr(conv_forms, '_CPU_BLOCK', rows * y[:, 0].nbytes // groups)

    def ours(x, kernel):
        return conv(x, kernel, strides=strides, padding=pads, dilation=dilation, groups=groups)

    check(ours, x, kernel, strides, pads, dilation, groups)
    if groups > 1:
        return
    text = str(jax.make_jaxpr(jax.grad(lambda k: ours(x, k).sum()))(kernel))
    assert text.count('conv_general_dilated') >= y.shape[1] // rows


def test_rows_of_zeros_alone_in_float32(x64):
    """What XLA's CPU compiler gets wrong in the gradient by x, and only in float32."""
    x, kernel, g = arrays((1, 3, 1, 2), (2, 2, 2, 3), (1, 4, 2, 3))

    def gradient(dtype):
        f = functools.partial(conv, padding=((1, 1), (2, 0)))
        return jax.jit(lambda *a: jax.vjp(f, *a[:2])[1](a[2]))(
            *(a.astype(dtype) for a in (x, kernel, g))
        )

    for ours, wide in zip(gradient(np.float32), gradient(np.float64), strict=True):
        np.testing.assert_allclose(ours, wide, rtol=0, atol=1e-5)


def test_derivatives_of_any_order(x64, monkeypatch):
    """Forward mode, and the gradient of a gradient, with blocks of rows."""
    monkeypatch.setattr(conv_forms, '_CPU_BLOCK', 1)
    x, kernel, dx, dkernel = arrays((1, 4, 3, 2), (3, 3, 2, 2), (1, 4, 3, 2), (3, 3, 2, 2))

    def penalty(function):
        def size(x, kernel):
            gradients = jax.grad(lambda *a: jnp.sin(function(*a)).sum(), (0, 1))(x, kernel)
            return sum(jnp.square(g).sum() for g in gradients)

        return size

    def reference(x, kernel):
        return plain(x, kernel, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)

    @jax.jit
    def results(x, kernel, dx, dkernel):
        return [
            (
                jax.jvp(f, (x, kernel), (dx, dkernel)),
                jax.grad(penalty(f), (0, 1))(x, kernel),
                jax.jvp(jax.grad(penalty(f)), (x, kernel), (dx, dkernel)),
            )
            for f in (conv, reference)
        ]

    ours, theirs = map(jax.tree.leaves, results(x, kernel, dx, dkernel))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2),
)
@example(size=(3, 3), window=(3, 4), strides=(2, 2), pads=((2, 2), (3, 0)))
@example(size=(1, 4), window=(2, 2), strides=(3, 2), pads=((3, 3), (0, 0)))
@example(size=(1, 2), window=(1, 2), strides=(3, 1), pads=((1, 4), (0, 0)))
@settings(max_examples=15, deadline=None)
def test_phases_of_strides(size, window, strides, pads):
    """The same function as the convolution, and in float32 its transpose in the gradient."""
    if any(n + sum(p) < k for n, p, k in zip(size, pads, window, strict=True)):
        return
    x, kernel = arrays((1, *size, 2), (*window, 2, 3), dtype=np.float32)
    y, back = jax.vjp(lambda x: conv_forms.phases(x, kernel, strides=strides, pads=pads), x)
    expected = loops(x, kernel, strides, pads, (1, 1), 1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    g = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    moved = np.asarray(arrays(x.shape, dtype=np.float32)[0])
    change = loops(moved, kernel, strides, pads, (1, 1), 1)
    np.testing.assert_allclose((back(g)[0] * moved).sum(), (g * change).sum(), rtol=0, atol=1e-3)


@given(
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2),
    split=st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 4, 1), (4, 4, 4), (4, 6, 2)]),
)
@settings(max_examples=10, deadline=None)
def test_any_options(size, window, strides, dilation, pads, split):
    channels, features, groups = split
    x, kernel = arrays(
        (1, *size, channels), (*window, channels // groups, features), dtype=np.float32
    )
    options = {'strides': strides, 'padding': pads, 'dilation': dilation, 'groups': groups}
    reach = [n + sum(p) - dilation * (k - 1) for n, p, k in zip(size, pads, window, strict=True)]
    if min(reach) < 1:
        with pytest.raises(ValueError, match='smaller than'):
            conv(x, kernel, **options)
        return
    expected = loops(x, kernel, (strides,) * 2, pads, (dilation,) * 2, groups)
    np.testing.assert_allclose(conv(x, kernel, **options), expected, rtol=0, atol=2e-5)


def test_padding_forms():
    x, kernel = arrays((1, 8, 7, 2), (3, 5, 2, 3), dtype=np.float32)
    for padding, pads in {
        None: ((2, 2), (4, 4)),
        1: ((1, 1), (1, 1)),
        (1, 2): ((1, 1), (2, 2)),
        (1, (2, 0)): ((1, 1), (2, 0)),
    }.items():
        y = conv(x, kernel, padding=padding, dilation=2)
        expected = loops(x, kernel, (1, 1), pads, (2, 2), 1)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('kernel_shape', 'groups'), [((3, 3, 1, 4), 4), ((3, 3, 2, 4), 2), ((1, 1, 4, 2), 1)]
)
def test_leading_axes_and_vmap(kernel_shape, groups):
    """None, one or two leading axes; `vmap` over x, over both, and over a gradient."""
    x, kernel = arrays((2, 3, 5, 4, 4), kernel_shape, dtype=np.float32)
    pads = ((kernel_shape[0] // 2,) * 2,) * 2
    flat = loops(x.reshape(6, 5, 4, 4), kernel, (1, 1), pads, (1, 1), groups)
    expected = flat.reshape(2, 3, 5, 4, -1)

    def loss(x, kernel):
        return jnp.square(conv(x, kernel, groups=groups)).sum()

    @jax.jit
    def run(x, kernel):
        y = conv(x, kernel, groups=groups)
        one = conv(x[0, 0], kernel, groups=groups)
        mapped = jax.vmap(functools.partial(conv, groups=groups))(
            x, jnp.stack([kernel, 2 * kernel])
        )
        each = jax.vmap(jax.grad(loss, 1), (0, None))(x, kernel)
        return y, one, mapped, each.sum(0), jax.grad(loss, 1)(x, kernel)

    y, one, mapped, each, whole = run(x, kernel)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one, expected[0, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mapped, [expected[0], 2 * expected[1]], rtol=0, atol=2e-5)
    np.testing.assert_allclose(each, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    'name', ['pointwise', 'depthwise 3x3', 'depthwise strided', 'grouped', 'plane gate']
)
def test_types(name):
    """bfloat16 stays, sums are kept in more digits than it has, mixed types are promoted."""
    x_shape, kernel_shape, strides, pads, dilation, groups = CASES[name]
    x, kernel = arrays(x_shape, kernel_shape, dtype=jnp.bfloat16)
    options = {'strides': strides, 'padding': pads, 'dilation': dilation, 'groups': groups}
    function = jax.jit(lambda x, kernel: conv(x, kernel, **options))
    y, back = jax.vjp(function, x, kernel)
    expected = loops(x, kernel, strides, pads, dilation, groups)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-7, atol=0.02)
    for gradient, of in zip(back(jnp.ones_like(y)), (x, kernel), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert gradient.shape == of.shape
    assert conv(x, kernel.astype(jnp.float32), **options).dtype == jnp.float32


def test_dense(x64):
    x, kernel = arrays((2, 3, 4, 5), (5, 6))
    expected = np.einsum('bhwi,io->bhwo', x, kernel)
    for shape in [(2, 3, 4, 5), (6, 4, 5), (24, 5), (2, 1, 3, 4, 5)]:
        y = dense(x.reshape(shape), kernel)
        assert y.shape == (*shape[:-1], 6)
        np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(conv_forms.map_product(x, kernel), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(dense(x[0, 0, 0], kernel), expected[0, 0, 0], rtol=0, atol=1e-13)
    gradient = jax.grad(lambda k: (dense(x, k) ** 2).sum())(kernel)
    np.testing.assert_allclose(
        gradient, 2 * np.einsum('bhwi,bhwo->io', x, expected), rtol=0, atol=1e-12
    )
    assert dense(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_multiply_accumulates():
    with cost.tally() as counts:
        conv(jnp.ones((2, 7, 6, 8)), jnp.ones((3, 3, 2, 12)), strides=2, groups=4)
        assert counts['macs'] == 2 * (4 * 3) * 9 * 2 * 12
        conv(jnp.ones((5, 6, 2)), jnp.ones((7, 7, 2, 1)))
        assert counts['macs'] == 2 * (4 * 3) * 9 * 2 * 12 + 30 * 49 * 2
        dense(jnp.ones((3, 4, 5)), jnp.ones((5, 6)))
    assert counts == {'macs': 5184 + 2940 + 360, 'matmul': 0}


@pytest.mark.parametrize('set_mesh', [False, True])
def test_a_sharded_batch_stays_where_it_is(set_mesh):
    """Forward and gradient on eight devices: weights' gradients are summed, nothing is gathered."""
    mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    whole = NamedSharding(mesh, PartitionSpec())
    kernels = {
        'pointwise': ((1, 1, 8, 8), 1),
        'dense': ((3, 3, 8, 8), 1),
        'depthwise': ((3, 3, 1, 8), 8),
        'grouped': ((3, 3, 2, 8), 4),
        'gate': ((3, 3, 2, 1), 1),
    }
    (x,) = arrays((16, 6, 5, 8), dtype=np.float32)
    weights = {n: 0.2 * arrays(s, dtype=np.float32)[0] for n, (s, _) in kernels.items()}
    weights['last'] = arrays((8, 8), dtype=np.float32)[0]

    def loss(weights, x):
        for name, (_, groups) in kernels.items():
            if name == 'gate':
                x = x * conv(x[..., :2], weights[name])
            else:
                strides = 2 if name == 'pointwise' else 1
                x = conv(x, weights[name], groups=groups, strides=strides)
        return jnp.square(dense(x, weights['last'])).mean()

    def accelerator(weights, x):
        """The wrapper that a GPU's branch has, on the CPU's devices."""
        names = {'strides': (1, 1), 'pads': ((1, 1), (1, 1)), 'dilation': (1, 1), 'groups': 4}
        grouped = per_example(lambda x, k: conv_forms.plain(x, k, **names))
        return jnp.square(grouped(x, weights['grouped'])).mean()

    functions = [loss, accelerator] if set_mesh else [loss]
    for function in functions:
        step = jax.jit(
            jax.value_and_grad(function, (0, 1)),
            in_shardings=(whole, split),
            out_shardings=(whole, (whole, split)),
        )
        if set_mesh:
            with jax.set_mesh(mesh):
                compiled = step.lower(weights, x).compile()
        else:
            compiled = step.lower(weights, x).compile()
        text = compiled.as_text()
        assert 'all-reduce' in text
        assert 'all-gather' not in text
        assert 'all-to-all' not in text
        ours = compiled(jax.device_put(weights, whole), jax.device_put(x, split))
        alone = jax.jit(jax.value_and_grad(function, (0, 1)))(weights, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, alone
        )


def test_per_example_falls_back():
    """One example on eight devices, and code that already runs on its part, are left alone."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = arrays((8, 3), (3, 2), dtype=np.float32)
    product = per_example(jnp.matmul)
    inside = jax.shard_map(
        product, mesh=mesh, in_specs=(PartitionSpec('data'), PartitionSpec()),
        out_specs=PartitionSpec('data'),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(product)(x[:1], w), x[:1] @ w, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(inside)(x, w), x @ w, rtol=1e-5)
        mapped = jax.jit(jax.vmap(product, (0, None)))(jnp.stack([x, 2 * x]), w)
    np.testing.assert_allclose(mapped, jnp.stack([x @ w, 2 * x @ w]), rtol=1e-5)


@pytest.mark.parametrize(
    ('x', 'kernel', 'options', 'message'),
    [
        ((5, 5, 4), (4, 4), {}, r'kernel must be .*\(4, 4\)'),
        ((4,), (3, 3, 4, 4), {}, r'x must be .*\(4,\)'),
        ((5, 5, 6), (3, 3, 4, 4), {}, 'kernel has 4 input channels .* x has 6'),
        ((5, 5, 6), (3, 3, 2, 4), {'groups': 4}, r'groups must .*\(6\) .*\(4\); got 4'),
        ((5, 5, 6), (3, 3, 2, 4), {'groups': 0}, 'groups must be at least 1'),
        ((5, 5, 6), (3, 3, 6, 4), {'padding': -1}, 'padding must be .* at least 0; got -1'),
        ((5, 5, 6), (3, 3, 6, 4), {'padding': (1, 2, 3)}, r'padding must .*\(1, 2, 3\)'),
        ((5, 5, 6), (3, 3, 6, 4), {'strides': 0}, 'strides must be .* got 0'),
        ((5, 5, 6), (3, 3, 6, 4), {'strides': (1, 1, 1)}, 'strides must be'),
        ((5, 5, 6), (3, 3, 6, 4), {'dilation': (1, 0)}, 'dilation must be'),
        ((5, 5, 6), (7, 3, 6, 4), {'padding': 0}, r'smaller than .*\(7, 3\)'),
    ],
)  # fmt: skip
def test_errors(x, kernel, options, message):
    x, kernel = jnp.ones(x), jnp.ones(kernel)
    with pytest.raises(ValueError, match=message):
        conv(x, kernel, **options)


def test_dense_errors():
    with pytest.raises(ValueError, match=r'5 input channels, but x has shape \(2, 4\)'):
        dense(jnp.ones((2, 4)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match='kernel must be'):
        dense(jnp.ones((2, 4)), jnp.ones((1, 4, 3)))
