"""From products to weighted sums: the mathematics that all forms of `attend` share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from attention_jax.functional import cost
from attention_jax.functional.contract import contract

Pair = tuple[jax.Array, jax.Array]


class Operands(NamedTuple):
    """What an attention is computed from: query, key and value of one type, all else wide."""

    query: jax.Array  # [..., n, d]
    key: jax.Array  # [..., m, d]
    value: jax.Array  # [..., m, e]
    query_norms: jax.Array | None = None  # [..., n, 1], half squared lengths, of 'gaussian' only
    key_norms: jax.Array | None = None  # [..., 1, m]
    bias: jax.Array | None = None  # [..., 1, m]
    relative: Pair | None = None  # [..., n, h] and [..., n, w]


def scores(operands: Operands, scale: float, count: cost.Kind | None = None) -> jax.Array:
    """S, `[..., n, m]`; not counted by itself, as it is computed in loops and branches, too."""
    query, key, _, *rest = operands
    return logits(scale, contract('...nd,...md->...nm', query, key, count=count), *rest)


def logits(
    scale: float,
    products: jax.Array,
    query_norms: jax.Array | None,
    key_norms: jax.Array | None,
    bias: jax.Array | None,
    relative: Pair | None,
) -> jax.Array:
    """S from the products `q.k [..., n, m]`."""
    if query_norms is not None:
        products = jnp.minimum(products - query_norms - key_norms, 0.0)  # -|q - k|^2 / 2
    s = products * scale
    if bias is not None:
        s = s + bias
    if relative is not None:
        rows, columns = relative
        s = s + rearrange(rows[..., :, None] + columns[..., None, :], '... h w -> ... (h w)')
    return s


def weights(kind: str, s: jax.Array) -> Pair:
    """P without its normaliser `[..., n, m]`, and the normaliser `[..., n, 1]` (or 1).

    The kind is what happens to S: 'softmax', 'sigmoid', 'exp' or 'linear' (nothing).
    """
    if kind == 'softmax':
        p = jnp.exp(s - top(s))
        total = p.sum(-1, keepdims=True)
        return p, jnp.where(total == 0, 1, total)
    activation = {'sigmoid': jax.nn.sigmoid, 'exp': jnp.exp, 'linear': lambda s: s}[kind]
    return activation(s), jnp.ones((1,) * s.ndim, s.dtype)


def top(s: jax.Array) -> jax.Array:
    """Largest logit of each row: finite also where all keys are taken out. It cancels in P."""
    return jnp.maximum(lax.stop_gradient(s).max(-1, keepdims=True), jnp.finfo(s.dtype).min)


def weighted_sum(p: jax.Array, total: jax.Array, value: jax.Array) -> jax.Array:
    """P v of what `weights` gives, `[..., n, e]` in the wide type."""
    # Dividing after the product: one pass less over [n, m], forward and backward.
    return contract('...nm,...me->...ne', p.astype(value.dtype), value, count=None) / total
