"""Forms of a convolution: equal in what they compute, each fast on some device.

`functional.conv` checks its arguments and chooses among them. Here x is `[b, *spatial, c]`, kernel
`[*window, c / groups, o]`, of one type; strides, pads and dilation have an entry a spatial axis.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from attention_jax.functional.broadcast import expand_to

Pads = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]

# Bytes of a result's gradient that stay in a CPU's cache beside what they are multiplied with.
_CPU_BLOCK = 640 * 1024


def output_sizes(spatial: Ints, window: Ints, strides: Ints, pads: Pads, dilation: Ints) -> Ints:
    """Positions along each spatial axis of the result."""
    return tuple(
        (n + low + high - d * (k - 1) - 1) // s + 1
        for n, k, s, (low, high), d in zip(spatial, window, strides, pads, dilation, strict=True)
    )


def plain(
    x: jax.Array, kernel: jax.Array, *, strides: Ints, pads: Pads, dilation: Ints, groups: int = 1
) -> jax.Array:
    """XLA's own convolution.

    Rows of zeros that no window shares with x are written out: the gradient by x is a convolution
    whose padding is negative there, and XLA's for a CPU (jaxlib 0.10.2) is wrong in float32.
    """
    reach = [d * (k - 1) for k, d in zip(kernel.shape[:-2], dilation, strict=True)]
    alone = [max(low - r, 0) for (low, _), r in zip(pads, reach, strict=True)]
    if any(alone):
        zeros = [(0, 0, 0), *((n, 0, 0) for n in alone), (0, 0, 0)]
        x = lax.pad(x, jnp.zeros((), x.dtype), zeros)
        pads = tuple((low - n, high) for (low, high), n in zip(pads, alone, strict=True))
    letters = 'DHW'[-len(strides) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
        feature_group_count=groups,
    )


def cpu_dense(
    x: jax.Array, kernel: jax.Array, *, strides: Ints, pads: Pads, dilation: Ints
) -> jax.Array:
    """A convolution without groups as a CPU takes it fastest."""
    if math.prod(kernel.shape[:-2]) == 1 and not any(map(any, pads)):
        return _pointwise(x, kernel, strides=strides)
    return _row_blocks(x, kernel, strides, pads, dilation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _row_blocks(
    x: jax.Array, kernel: jax.Array, strides: Ints, pads: Pads, dilation: Ints
) -> jax.Array:
    """A convolution whose gradient by the kernel is a sum over blocks of rows.

    XLA's CPU gradient by the kernel is a convolution with the result's gradient as its window, and
    loses a factor of two to five as soon as that does not fit the cache.
    """
    return plain(x, kernel, strides=strides, pads=pads, dilation=dilation)


@functools.partial(_row_blocks.defjvp, symbolic_zeros=True)
def _row_blocks_jvp(
    strides: Ints, pads: Pads, dilation: Ints, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[jax.Array, Any]:
    """The tangents in forms whose transposes are fast: that by the kernel is a sum over blocks."""
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    y = _row_blocks(x, kernel, strides, pads, dilation)
    terms = []
    if not isinstance(x_tangent, SymbolicZero):
        parts = set(strides) != {1} and set(dilation) == {1}
        form = phases if parts else functools.partial(plain, dilation=dilation)
        terms.append(form(x_tangent, kernel, strides=strides, pads=pads))
    if not isinstance(kernel_tangent, SymbolicZero):
        terms.append(_each_block(x, kernel_tangent, strides, pads, dilation))
    return y, sum(terms[1:], terms[0]) if terms else SymbolicZero.from_primal_value(y)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3, 4))
def _each_block(
    x: jax.Array, kernel: jax.Array, strides: Ints, pads: Pads, dilation: Ints
) -> jax.Array:
    """The convolution as one for each block of the result's rows.

    The rows of x that a block sees are cut out again for the gradient, not kept.
    """
    window = kernel.shape[:-2]
    out = output_sizes(x.shape[1:-1], window, strides, pads, dilation)
    row = math.prod((x.shape[0], *out[1:], kernel.shape[-1])) * x.dtype.itemsize
    count = math.ceil(out[0] / max(_CPU_BLOCK // max(row, 1), 1))
    span, rows = dilation[0] * (window[0] - 1) + 1, x.shape[1]
    pieces = []
    for block in range(count):
        first, end = block * out[0] // count, (block + 1) * out[0] // count
        top = first * strides[0] - pads[0][0]
        bottom = (end - 1) * strides[0] - pads[0][0] + span
        seen = lax.slice_in_dim(x, min(max(top, 0), rows), min(max(bottom, 0), rows), axis=1)
        zeros = (max(min(0, bottom) - top, 0), max(bottom - max(rows, top), 0))
        settings = {'strides': strides, 'pads': (zeros, *pads[1:]), 'dilation': dilation}
        pieces.append(plain(seen, kernel, **settings))
    return jnp.concatenate(pieces, 1)


def phases(x: jax.Array, kernel: jax.Array, *, strides: Ints, pads: Pads) -> jax.Array:
    """A strided convolution as the sum of those of x's phases: at stride 2, even and odd rows.

    Each of these has stride 1. A CPU's gradient by x of that takes less than half as long, and
    does not meet dilated inputs, of some of which XLA's compiler (jaxlib 0.10.2) aborts.
    """
    window, spatial = kernel.shape[:-2], x.shape[1:-1]
    ones = (1,) * len(strides)
    out = output_sizes(spatial, window, strides, pads, ones)
    total = None
    for phase in itertools.product(*map(range, strides)):
        first = [(i + low) % s for i, (low, _), s in zip(phase, pads, strides, strict=True)]
        entries = [-((i - n) // s) for i, n, s in zip(phase, spatial, strides, strict=True)]
        if min(entries) < 1 or any(t >= k for t, k in zip(first, window, strict=True)):
            continue  # no tap meets these
        taps = kernel[tuple(slice(t, None, s) for t, s in zip(first, strides, strict=True))]
        part = x[(slice(None), *(slice(i, None, s) for i, s in zip(phase, strides, strict=True)))]
        # Tap number m of result o meets entry o + m - low of this phase.
        lows = [
            (i + low - t) // s
            for i, t, (low, _), s in zip(phase, first, pads, strides, strict=True)
        ]
        highs = [
            n + m - 1 - low - have
            for n, m, low, have in zip(out, taps.shape[:-2], lows, entries, strict=True)
        ]
        zeros = tuple(zip(lows, highs, strict=True))  # below 0: cut off
        term = plain(part, taps, strides=ones, pads=zeros, dilation=ones)
        total = term if total is None else total + term
    if total is None:  # every tap meets zeros
        return jnp.zeros((x.shape[0], *out, kernel.shape[-1]), x.dtype)
    return total


def flat_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` as one product of two matrices: on a CPU twice as fast in the gradient."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def map_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` as a convolution, with which accelerators fuse what stands around it."""
    return plain(x, kernel[None, None], strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1))


def _pointwise(x: jax.Array, kernel: jax.Array, *, strides: Ints) -> jax.Array:
    """A window of one tap, no padding: strides are a slice, the rest a product."""
    if set(strides) != {1}:
        x = lax.slice(x, (0,) * x.ndim, x.shape, (1, *strides, 1))
    return flat_product(x, kernel.reshape(kernel.shape[-2:]))


def toeplitz(x: jax.Array, kernel: jax.Array, pads: Pads, dilation: Ints) -> jax.Array:
    """One or two channels to one: taps along one axis as a matrix, along the other as a window.

    A convolution with so few channels leaves vector and matrix units idle, and its kernel gradient
    hardly compiles for a TPU. Along an axis of n positions it is a product with the banded matrix
    `band[t, p, i, q] = kernel[t, p - q + low, i]`, so that all of it is a convolution over the
    other axis, of n * c channels to n; the axis taken is the shorter one.

    Args:
        x: `[b, h, w, c]`.
        kernel: `[kh, kw, c, 1]`.
        pads: zeros around h and w.
        dilation: distance of the taps along h and w.
    """
    turn = x.shape[1] < x.shape[2]
    if turn:
        x, kernel = x.swapaxes(1, 2), kernel.swapaxes(0, 1)
        pads, dilation = pads[::-1], dilation[::-1]
    batch, rows, size, channels = x.shape
    taps, (low, high), step = kernel.shape[1], pads[1], dilation[1]
    out = size + low + high - step * (taps - 1)
    position = np.arange(size)[:, None] - np.arange(out) + low  # [size, out]
    hits = position == step * np.arange(taps)[:, None, None]  # [taps, size, out]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # A sum with one term at most: exact at any matmul precision.
    band = jnp.einsum(
        'tjc,jpq->tpcq', kernel[..., 0].astype(wide), hits.astype(wide), precision='highest'
    )
    y = plain(
        x.reshape(batch, rows, size * channels).astype(wide),
        band.reshape(-1, size * channels, out),
        strides=(1,),
        pads=pads[:1],
        dilation=dilation[:1],
    )
    y = y.swapaxes(1, 2) if turn else y
    return y.astype(x.dtype)[..., None]


def merged(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Ints,
    pads: Pads,
    dilation: Ints,
    groups: int,
    width: int,
    dense: Callable[..., jax.Array],
) -> jax.Array:
    """Grouped convolution as dense convolutions that see about `width` channels each.

    Neighbouring groups share a dense convolution whose kernel is zero between them: more work on
    paper, but full vectors and tiles; and XLA's CPU gradient of a grouped convolution is hundreds
    of times slower.
    """
    merge = max(min(width // kernel.shape[-2], groups), 1)
    while groups % merge:
        merge -= 1
    parts = groups // merge
    blocks = _blocks(kernel, groups, merge)
    results = [
        dense(piece, blocks[..., part, :, :], strides=strides, pads=pads, dilation=dilation)
        for part, piece in enumerate(jnp.split(x, parts, -1))
    ]
    return jnp.concatenate(results, -1)


def _blocks(kernel: jax.Array, groups: int, merge: int) -> jax.Array:
    """Kernels of `merge` groups each, zero between groups: `[*window, parts, inputs, outputs]`."""
    *window, inputs, features = kernel.shape
    parts = groups // merge
    kernel = kernel.reshape(*window, inputs, parts, merge, features // groups)
    eye = jnp.eye(merge, dtype=kernel.dtype)
    # [*window, parts, merge, inputs, merge, outputs]
    blocks = jnp.einsum('...ipgo,gh->...phigo', kernel, eye, precision='highest')
    return blocks.reshape(*window, parts, merge * inputs, features // parts)


def shifts(
    x: jax.Array, kernel: jax.Array, *, strides: Ints, pads: Pads, dilation: Ints
) -> jax.Array:
    """Depthwise convolution as shifted copies times a vector of weights, summed in float32."""
    if len(strides) == 1:  # a map of one row
        y = shifts(
            x[:, None],
            kernel[None],
            strides=(1, *strides),
            pads=((0, 0), *pads),
            dilation=(1, *dilation),
        )
        return y[:, 0]
    dtype = x.dtype
    x, kernel = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, kernel))
    if set(strides) == {1}:
        return _unit_shifts(x, kernel, pads, dilation).astype(dtype)
    return _shifted_sum(x, kernel, strides, pads, dilation).astype(dtype)


def _shifted_sum(
    x: jax.Array, kernel: jax.Array, strides: Ints, pads: Pads, dilation: Ints
) -> jax.Array:
    rows, columns, _, channels = kernel.shape
    out = output_sizes(x.shape[1:3], (rows, columns), strides, pads, dilation)
    x = _pad(x, pads)
    span = [(n - 1) * s + 1 for n, s in zip(out, strides, strict=True)]
    y = None
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation[0], j * dilation[1]
            end = (x.shape[0], top + span[0], left + span[1], channels)
            term = lax.slice(x, (0, top, left, 0), end, (1, *strides, 1)) * expand_to(
                kernel[i, j], x
            )
            y = term if y is None else y + term
    return y


def _pad(x: jax.Array, pads: Pads) -> jax.Array:
    """Zeros around h and w; a negative number cuts."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unit_shifts(x: jax.Array, kernel: jax.Array, pads: Pads, dilation: Ints) -> jax.Array:
    """Depthwise at stride 1, with a gradient of the kernel that reads its operands once."""
    return _shifted_sum(x, kernel, (1, 1), pads, dilation)


def _unit_shifts_forward(
    x: jax.Array, kernel: jax.Array, pads: Pads, dilation: Ints
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _unit_shifts(x, kernel, pads, dilation), (x, kernel)


def _unit_shifts_backward(
    pads: Pads, dilation: Ints, residual: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    rows, columns = kernel.shape[:2]
    reach = [d * (k - 1) for d, k in zip(dilation, (rows, columns), strict=True)]
    turned = tuple((r - low, r - high) for r, (low, high) in zip(reach, pads, strict=True))
    dx = _unit_shifts(g, kernel[::-1, ::-1], turned, dilation)

    x = _pad(x, pads)
    width = g.shape[2]

    def row(r: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds output row r to the sums of all taps, while its rows of x are in the cache."""
        gr = lax.dynamic_index_in_dim(g, r, 1, keepdims=False)
        lines = [
            lax.dynamic_index_in_dim(x, r + i * dilation[0], 1, keepdims=False) for i in range(rows)
        ]
        shifted = [
            line[:, j * dilation[1] : j * dilation[1] + width]
            for line in lines
            for j in range(columns)
        ]
        return tuple(s + (t * gr).sum(0) for s, t in zip(sums, shifted, strict=True))

    zeros = jnp.zeros((width, x.shape[3]), x.dtype)
    sums = lax.fori_loop(0, g.shape[1], row, (zeros,) * (rows * columns))
    return dx, jnp.stack([s.sum(0) for s in sums]).reshape(kernel.shape)


_unit_shifts.defvjp(_unit_shifts_forward, _unit_shifts_backward)
