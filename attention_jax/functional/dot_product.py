"""Attention between positions, in memory linear in the number of positions.

With queries `q [n, d]`, keys `k [m, d]` and values `v [m, e]`, every function here computes::

    S_ij = similarity(q_i, k_j)          y_i = sum_j P_ij v_j          P = weighting(S)

Small problems take the plain form, `P` in memory and ordinary autodiff; large ones take a kernel
(`attention_kernels`) or some queries at a time (`attention_chunks`). Without a normaliser over the
keys `P` is linear in `S`, and `q (k^T v)` replaces `(q k^T) v` (Shen et al., arXiv 1812.01243,
among others).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax import lax

from attention_jax import checks
from attention_jax.functional import attention_chunks, attention_kernels, cost
from attention_jax.functional.attention_scores import (
    Operands,
    Pair,
    scores,
    weighted_sum,
    weights,
)
from attention_jax.functional.broadcast import broadcast_shape, expand_to
from attention_jax.functional.contract import contract
from attention_jax.functional.dtypes import Dtype, statistics_type

SIMILARITIES = ('dot', 'cosine', 'gaussian')
WEIGHTINGS = ('softmax', 'sigmoid', 'mean', 'none')
IMPLEMENTATIONS = (None, 'xla', 'pallas', 'cudnn')

_PLAIN_SCORES = 2**20  # entries of P a head up to which the plain form is taken


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    similarity: str = 'dot',
    weighting: str = 'softmax',
    scale: float | jax.Array | None = None,
    bias: jax.Array | None = None,
    relative: Pair | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Weighted sum of the values for every query.

    The plain form is ordinary autodiff: `jax.jvp` and `jax.hessian` work. The chunked form and the
    kernels have a hand-written gradient, through which forward mode raises a TypeError: give
    `chunk_size=n` there. Leading axes are broadcast against each other.

    Args:
        query: `[..., n, d]`.
        key: `[..., m, d]`.
        value: `[..., m, e]`.
        similarity: 'dot', `scale q.k`; 'cosine', the same of `q / |q|` and `k / |k|` (a vector
            shorter than 1e-12 is divided by that); 'gaussian', `-scale |q - k|^2 / 2`.
        weighting: 'softmax' over the keys; 'sigmoid'; 'mean', `S / m`; 'none', `S`. For 'gaussian'
            the last two take `exp(S)` in place of S. Only the softmax does not grow with m.
        scale: None is `d**-0.5` for 'dot' and 'cosine', 1 for 'gaussian'. A number or a scalar.
        bias: `[..., m]`, added to S, one number a key; -inf takes a key out. A query that has no
            key left gets 0.
        relative: logits `([..., n, h], [..., n, w])` over a grid of `m = h * w` keys, row-major:
            `S_ij` gets the sum of the one of the key's row and the one of its column.
        chunk_size: queries taken at a time; None takes all of them (the plain form) where n m is
            at most a million, and otherwise as many as keep a block small. n or more is the plain
            form. 'mean' and 'none' of 'dot' and 'cosine' need no chunks.
        implementation: None chooses: JAX's Pallas kernel where the program is compiled for a TPU
            and cuDNN where the backend is a GPU, both only for problems that would be chunked and
            that the kernel can do; XLA else. Or 'xla', 'pallas', 'cudnn'.

    Returns:
        `[..., n, e]` in the type of `value`.

    Raises:
        ValueError: unknown names, shapes that do not fit, 'sigmoid' of 'gaussian', or a kernel
            asked for by name that cannot do it.
    """
    operands = _prepared(query, key, value, bias, relative)
    checks.choice('implementation', implementation, IMPLEMENTATIONS)
    if chunk_size is not None:
        checks.at_least('chunk_size', chunk_size, 1)
    operands, kind, scale = _reduced(operands, similarity, weighting, scale)
    query, key, value, *_ = operands
    batch, (n, d), (m, e) = math.prod(query.shape[:-2]), query.shape[-2:], value.shape[-2:]

    if implementation in ('pallas', 'cudnn'):
        reason = attention_kernels.refusal(implementation, kind, operands)
        if chunk_size is not None:
            reason = f'it chooses its own blocks, but chunk_size {chunk_size} was given'
        if reason:
            raise ValueError(
                f"implementation {implementation!r} cannot do this: {reason}; use 'xla'"
            )

    small = n * m <= _PLAIN_SCORES if chunk_size is None else chunk_size >= n
    chunk = chunk_size or attention_chunks.chunk_size(batch, n, m)
    macs = n * m * (d + e)
    if kind == 'linear' and (n + m) * d * e < macs:
        y = _keys_first(operands, scale)
    else:
        cost.add('matmul', batch * macs)  # for all forms: a branch or a loop is traced once
        if implementation == 'pallas':
            y = attention_kernels.pallas(query, key, value, scale=scale)
        elif implementation == 'cudnn':
            y = attention_kernels.cudnn(query, key, value, scale=scale)
        elif small or kind == 'linear':  # here n m is at most (n + m) min(d, e)
            y = weighted_sum(*weights(kind, scores(operands, scale)), value)
        elif implementation is None and chunk_size is None:
            y = _fastest(kind, scale, chunk, operands)
        else:
            y = attention_chunks.attend(kind, scale, chunk, operands)
    return (y / m if weighting == 'mean' else y).astype(value.dtype)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    similarity: str = 'dot',
    weighting: str = 'softmax',
    scale: float | jax.Array | None = None,
    bias: jax.Array | None = None,
    relative: Pair | None = None,
) -> jax.Array:
    """The weights P of `attend`, `[..., n, m]` in the type of `query`, for a picture of them.

    Arguments and errors are those of `attend`; give it only the query rows wanted.
    """
    dtype, m = query.dtype, key.shape[-2]
    operands = _prepared(query, key, key, bias, relative)
    operands, kind, scale = _reduced(operands, similarity, weighting, scale)
    p, total = weights(kind, scores(operands, scale, count='matmul'))
    return (p / (m if weighting == 'mean' else total)).astype(dtype)


def additive_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weight: jax.Array,
    *,
    activation: str = 'tanh',
    weighting: str = 'softmax',
    chunk_size: int | None = None,
) -> jax.Array:
    """Attention by a small network on each pair: `S_ij = w . act(q_i + k_j)`.

    Time `O(n m d)`; in chunks, whose gradient computes each block again, memory is linear in n and
    in m. Forward and reverse mode both work.

    Args:
        query: `[..., n, d]`.
        key: `[..., m, d]`.
        value: `[..., m, e]`.
        weight: `[d]`, shared by everything.
        activation: 'tanh' or 'relu'.
        weighting: 'softmax', 'sigmoid', 'mean' or 'none', as in `attend`.
        chunk_size: queries taken at a time; None chooses; n or more takes all of them.

    Returns:
        `[..., n, e]` in the type of `value`.

    Raises:
        ValueError: unknown names, or shapes that do not fit.
    """
    query, key, value, *_ = _prepared(query, key, value, None, None)
    checks.choice('activation', activation, ('tanh', 'relu'))
    checks.choice('weighting', weighting, WEIGHTINGS)
    batch, (n, d), (m, e) = math.prod(query.shape[:-2]), query.shape[-2:], value.shape[-2:]
    if weight.shape != (d,):
        raise ValueError(f'weight must be [d] = ({d},), as the query, got shape {weight.shape}')
    if chunk_size is not None:
        checks.at_least('chunk_size', chunk_size, 1)
    compute = statistics_type(query.dtype)
    act: Callable[[jax.Array], jax.Array] = jnp.tanh if activation == 'tanh' else jax.nn.relu
    kind = 'linear' if weighting in ('mean', 'none') else weighting
    cost.add('matmul', batch * n * m * (d + e))

    def block(q: jax.Array, key: jax.Array, value: jax.Array, weight: jax.Array) -> jax.Array:
        pairs = q.astype(compute)[..., :, None, :] + key.astype(compute)[..., None, :, :]
        w = expand_to(weight.astype(compute), pairs)
        return weighted_sum(*weights(kind, jnp.sum(act(pairs) * w, -1)), value)

    chunk = chunk_size or max(min(attention_chunks.BLOCK_SCORES // max(batch * m * d, 1), n), 1)
    if chunk >= n:
        y = block(query, key, value, weight)
    else:
        remembered = jax.checkpoint(block)
        y = attention_chunks.by_chunks(lambda q: remembered(q, key, value, weight), chunk, query)
    return (y / m if weighting == 'mean' else y).astype(value.dtype)


def _prepared(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    relative: Pair | None,
) -> Operands:
    """Checks the shapes; one type and the same leading axes for all."""
    arrays = {'query': query, 'key': key, 'value': value}
    for name, x in arrays.items():
        if x.ndim < 2:
            raise ValueError(f'{name} must be [..., positions, features], got shape {x.shape}')
    (n, d), m = query.shape[-2:], key.shape[-2]
    if key.shape[-1] != d:
        raise ValueError(f'key must have the {d} features of the query, got shape {key.shape}')
    if value.shape[-2] != m:
        raise ValueError(f'value must have the {m} positions of the key, got shape {value.shape}')
    checks.at_least('the number of keys', m, 1)
    if bias is not None:
        if bias.shape[-1:] != (m,):
            raise ValueError(f'bias must be [..., m] with the {m} keys, got shape {bias.shape}')
        arrays['bias'] = bias = bias[..., None, :]
    if relative is not None:
        rows, columns = relative
        fits = rows.ndim > 1 and columns.ndim > 1 and rows.shape[-2] == columns.shape[-2] == n
        if not fits or rows.shape[-1] * columns.shape[-1] != m:
            raise ValueError(
                f'relative must be [..., n, h] and [..., n, w] with n = {n} and h * w = {m}, '
                f'got shapes {rows.shape} and {columns.shape}'
            )
        arrays |= {'relative[0]': rows, 'relative[1]': columns}
    batch = broadcast_shape(**{name: x.shape[:-2] for name, x in arrays.items()})
    dtype = jnp.result_type(query, key, value)

    def spread(operands: Any, dtype: Dtype) -> Any:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*batch, *x.shape[-2:])).astype(dtype), operands
        )

    bias, relative = spread((bias, relative), statistics_type(dtype))
    return Operands(*spread((query, key, value), dtype), bias=bias, relative=relative)


def _reduced(
    operands: Operands, similarity: str, weighting: str, scale: float | jax.Array | None
) -> tuple[Operands, str, float]:
    """Reduces every similarity to products: operands, the kind of `weights`, scale."""
    checks.choice('similarity', similarity, SIMILARITIES)
    checks.choice('weighting', weighting, WEIGHTINGS)
    query, key, *_ = operands
    wide = statistics_type(query.dtype)
    kind = 'linear' if weighting in ('mean', 'none') else weighting
    norms = (None, None)
    if similarity == 'cosine':
        query, key = _unit(query), _unit(key)
    if similarity == 'gaussian':
        if weighting == 'sigmoid':
            raise ValueError("weighting 'sigmoid' has no meaning for similarity 'gaussian'")
        kind = 'exp' if kind == 'linear' else kind
        if query.dtype == wide:
            # Distances do not change, but far from the origin their digits would be lost.
            centre = lax.stop_gradient(key.mean(-2, keepdims=True))
            query, key = query - centre, key - centre
        q2, k2 = (0.5 * jnp.square(x.astype(wide)).sum(-1, keepdims=True) for x in (query, key))
        norms = (q2, rearrange(k2, '... m 1 -> ... 1 m'))
    if scale is None:
        scale = 1.0 if similarity == 'gaussian' else query.shape[-1] ** -0.5
    if not isinstance(scale, int | float):
        # A scale that may be learned goes into the query, outside the hand-written gradient.
        if jnp.ndim(scale):
            raise ValueError(f'scale must be a number or a scalar, got shape {jnp.shape(scale)}')
        if similarity == 'gaussian':
            root = jnp.sqrt(scale).astype(wide)
            query, key = ((x.astype(wide) * root).astype(x.dtype) for x in (query, key))
            norms = jax.tree.map(lambda x: x * scale.astype(wide), norms)
        else:
            query = (query.astype(wide) * scale.astype(wide)).astype(query.dtype)
        scale = 1.0
    q2, k2 = norms
    operands = operands._replace(query=query, key=key, query_norms=q2, key_norms=k2)
    return operands, kind, float(scale)


def _unit(x: jax.Array) -> jax.Array:
    """`x / max(|x|, 1e-12)`; a division by `maximum(norm(x), ...)` has gradient NaN at 0."""
    wide = x.astype(statistics_type(x.dtype))
    square = jnp.square(wide).sum(-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def _keys_first(operands: Operands, scale: float) -> jax.Array:
    """`S v` as `q (k^T v)`, for weights that are linear in S."""
    query, key, value, _, _, bias, relative = operands
    wide = value.astype(statistics_type(value.dtype))
    y = contract(
        '...nd,...de->...ne',
        query.astype(wide.dtype),
        contract('...md,...me->...de', key, value),
    )
    y = y * scale
    # What is added to S is not counted: in the other order it is no product.
    if bias is not None:
        y = y + contract('...im,...me->...ie', bias, wide, count=None)
    if relative is not None:
        rows, columns = relative
        h = rows.shape[-1]
        by_row = reduce(wide, '... (h w) e -> ... h e', 'sum', h=h)
        by_column = reduce(wide, '... (h w) e -> ... w e', 'sum', h=h)
        y = y + contract('...nh,...he->...ne', rows, by_row, count=None)
        y = y + contract('...nw,...we->...ne', columns, by_column, count=None)
    return y


def _fastest(kind: str, scale: float, chunk: int, operands: Operands) -> jax.Array:
    """A kernel where there is one for the device and the problem, else chunks."""
    query, key, value, *_ = operands
    if not attention_kernels.refusal('cudnn', kind, operands):
        # Traced on no other backend: the call itself asks for a GPU.
        return attention_kernels.cudnn(query, key, value, scale=scale)
    if attention_kernels.refusal('pallas', kind, operands):
        return attention_chunks.attend(kind, scale, chunk, operands)

    def chunked(*arrays: jax.Array) -> jax.Array:
        return attention_chunks.attend(kind, scale, chunk, Operands(*arrays))

    kernel = functools.partial(attention_kernels.pallas, scale=scale)
    return lax.platform_dependent(query, key, value, tpu=kernel, default=chunked)
