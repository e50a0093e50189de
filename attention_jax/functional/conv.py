"""Convolution and dense layers in the lowering that is fast on the device at hand.

One convolution is one mathematical function, but no single program for it is fast everywhere: a
1x1 convolution on a CPU is several times faster as a flat matrix product, and slower so on a TPU;
narrow groups are best merged into 16 channels on a CPU, 128 on a TPU, and left alone on a GPU; and
a CPU wants the gradient by the kernel in pieces that fit its cache. `lax.platform_dependent` keeps
only the branch of the device at hand.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.functional import conv_forms, cost
from attention_jax.functional.conv_forms import Ints, Pads
from attention_jax.functional.sharding import per_example

# Compile time grows with the taps: beyond a 7x7 window XLA's own depthwise convolution is used.
_MOST_SHIFTS = 49
# Channels up to which one product of all groups costs a CPU less than several of some.
_MOST_DENSE = 256
# Channels that a dense convolution made of merged groups sees: at least one vector on a CPU, where
# more are taken rather than many pieces to compile; one tile of the matrix unit on a TPU.
_CPU_CHANNELS, _CPU_PIECES = 16, 16
_TPU_CHANNELS = 128


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: int | Sequence[int | tuple[int, int]] | None = None,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolution (cross-correlation, as every deep learning library has it), channels last.

    `y[p, o] = sum_{t, i} x[p * strides + t * dilation - padding, i] kernel[t, i, o]`, with o's
    group giving the channels that i runs over.

    The gradients of depthwise convolutions are written by hand, so forward-mode differentiation
    (`jax.jvp`, `jax.hessian`) of those raises a TypeError; all else is ordinary autodiff.

    Args:
        x: `[..., *spatial, c]`, any leading axes.
        kernel: `[*window, c / groups, o]`, one, two or three window axes.
        strides: one number, or one a spatial axis.
        padding: zeros around x. None is `(k - 1) // 2 * dilation` on each side (never 'SAME', which
            pads even sizes unevenly at strides); else one number for all sides, or for each spatial
            axis a number or a pair (low, high).
        dilation: one number, or one a spatial axis: distance of the window's taps.
        groups: the channels of x and of the result are split into as many groups, each group of
            results seeing only its own channels.

    Returns:
        `[..., *out, o]` in the promoted type of x and kernel, with
        `out = (spatial + low + high - dilation * (k - 1) - 1) // strides + 1`.

    Raises:
        ValueError: the shapes do not fit, or an argument is out of range.
    """
    rank = kernel.ndim - 2
    if rank not in (1, 2, 3):
        raise ValueError(
            f'kernel must be [*window, c / groups, o] with 1, 2 or 3 window axes; '
            f'got shape {kernel.shape}'
        )
    if x.ndim < rank + 1:
        raise ValueError(f'x must be [..., {rank} spatial axes, c]; got shape {x.shape}')
    channels, features = x.shape[-1], kernel.shape[-1]
    if groups < 1 or channels % groups or features % groups:
        raise ValueError(
            f'groups must be at least 1 and divide the channels of x ({channels}) and the features '
            f'of kernel ({features}); got {groups}'
        )
    if kernel.shape[-2] * groups != channels:
        raise ValueError(
            f'kernel has {kernel.shape[-2]} input channels in each of {groups} groups, '
            f'{kernel.shape[-2] * groups} in all, but x has {channels}'
        )
    window = kernel.shape[:-2]
    strides = each_axis('strides', strides, rank)
    dilation = each_axis('dilation', dilation, rank)
    if padding is None:
        pads = tuple(((k - 1) // 2 * d,) * 2 for k, d in zip(window, dilation, strict=True))
    else:
        pads = pad_pairs(padding, rank)
    spatial = x.shape[-rank - 1 : -1]
    out = conv_forms.output_sizes(spatial, window, strides, pads, dilation)
    if min(out) < 1:
        raise ValueError(
            f"x of spatial size {spatial} with padding {pads} is smaller than the kernel's window "
            f'{window} at dilation {dilation}; enlarge x or the padding'
        )

    leading = x.shape[: -rank - 1]
    cost.add('macs', math.prod(leading) * math.prod(out) * math.prod(kernel.shape))
    dtype = jnp.result_type(x, kernel)
    x = x.astype(dtype).reshape(math.prod(leading), *x.shape[-rank - 1 :])
    y = _lower(x, kernel.astype(dtype), strides, pads, dilation, groups)
    return y.reshape(*leading, *y.shape[1:])


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Matrix product over the last axis, of vectors and maps alike.

    Args:
        x: `[..., c]`.
        kernel: `[c, o]`.

    Returns:
        `[..., o]` in the promoted type of x and kernel.

    Raises:
        ValueError: the shapes do not fit.
    """
    if kernel.ndim != 2:
        raise ValueError(f'kernel must be [c, o]; got shape {kernel.shape}')
    if x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f'kernel has {kernel.shape[0]} input channels, but x has shape {x.shape}')
    cost.add('macs', x.size * kernel.shape[1])
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if x.ndim <= 2:
        return x @ kernel
    other = conv_forms.map_product if x.ndim == 4 else jnp.matmul
    return lax.platform_dependent(x, kernel, cpu=conv_forms.flat_product, default=other)


def each_axis(name: str, value: int | Sequence[int], rank: int) -> Ints:
    """One positive integer a spatial axis; `name` is for the error."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(numbers) != rank or any(n != int(n) or n < 1 for n in numbers):
        raise ValueError(
            f'{name} must be one integer of at least 1, or {rank} of them (one a spatial axis); '
            f'got {value}'
        )
    return tuple(int(n) for n in numbers)


def pad_pairs(padding: int | Sequence[int | tuple[int, int]], rank: int) -> Pads:
    """A pair (low, high) a spatial axis."""
    axes = tuple(padding) if isinstance(padding, Sequence) else (padding,) * rank
    pairs = tuple(tuple(p) if isinstance(p, Sequence) else (p, p) for p in axes)
    if len(pairs) != rank or any(len(p) != 2 for p in pairs):
        raise ValueError(
            f'padding must be one integer, or for each of {rank} spatial axes an integer or a pair '
            f'(low, high); got {padding}'
        )
    if any(n != int(n) or n < 0 for pair in pairs for n in pair):
        raise ValueError(f'padding must be integers of at least 0; got {padding}')
    return tuple((int(low), int(high)) for low, high in pairs)


def _lower(
    x: jax.Array, kernel: jax.Array, strides: Ints, pads: Pads, dilation: Ints, groups: int
) -> jax.Array:
    """Chooses the form; x `[b, *spatial, c]`, arguments checked and of one type."""
    rank = len(strides)
    window, channels, features = kernel.shape[:-2], x.shape[-1], kernel.shape[-1]
    settings = {'strides': strides, 'pads': pads, 'dilation': dilation}
    plain = functools.partial(conv_forms.plain, **settings, groups=groups)

    if groups == 1:
        gates = rank == 2 and channels <= 2 and features == 1 and set(strides) == {1}
        if gates and math.prod(window) > 1:
            return conv_forms.toeplitz(x, kernel, pads, dilation)
        cpu = functools.partial(conv_forms.cpu_dense, **settings)
        return lax.platform_dependent(x, kernel, cpu=cpu, default=plain)

    if groups == channels == features and math.prod(window) <= _MOST_SHIFTS and rank < 3:
        shifts = functools.partial(conv_forms.shifts, **settings)
        return lax.platform_dependent(x, kernel, cpu=shifts, default=plain)
    if groups == channels == features:
        return plain(x, kernel)
    if math.prod(window) == 1 and channels <= _MOST_DENSE:
        width = channels
    else:
        width = max(_CPU_CHANNELS, channels // _CPU_PIECES)
    merged = functools.partial(conv_forms.merged, **settings, groups=groups)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(merged, width=width, dense=conv_forms.cpu_dense),
        tpu=functools.partial(merged, width=_TPU_CHANNELS, dense=conv_forms.plain),
        default=per_example(plain),
    )
