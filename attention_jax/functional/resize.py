"""Enlarging maps by a whole number."""

import jax
import jax.numpy as jnp
from einops import rearrange

from attention_jax import checks


def upsample(x: jax.Array, factor: int, method: str = 'nearest') -> jax.Array:
    """Enlarges height and width, as PyTorch's `interpolate(scale_factor=factor)`.

    Args:
        x: `[..., h, w, c]`.
        factor: a whole number, at least 1.
        method: 'nearest', every value repeated factor x factor times; or 'bilinear', corners not
            aligned (the border is repeated).

    Returns:
        `[..., h * factor, w * factor, c]` in the type of x.

    Raises:
        ValueError: a factor below 1, an unknown method, or x with fewer than three axes.
    """
    checks.at_least('factor', factor, 1)
    checks.choice('method', method, ('nearest', 'bilinear'))
    if x.ndim < 3:
        raise ValueError(f'x must be [..., h, w, c], got shape {x.shape}')
    if factor == 1:
        return x
    *batch, h, w, c = x.shape
    if method == 'bilinear':
        return jax.image.resize(x, (*batch, h * factor, w * factor, c), 'bilinear')
    # Not `repeat`: its gradient adds the cells in two steps.
    cells = (*batch, h, factor, w, factor, c)
    y = jnp.broadcast_to(x[..., :, None, :, None, :], cells)
    return rearrange(y, '... h a w b c -> ... (h a) (w b) c')
