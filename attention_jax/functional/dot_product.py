"""Attention between positions, in memory linear in the number of positions.

With queries `q [n, d]`, keys `k [m, d]` and values `v [m, e]`, every function here computes::

    S_ij = similarity(q_i, k_j)          y_i = sum_j P_ij v_j          P = weighting(S)

Small problems take the plain form, `P` in memory and ordinary autodiff. Large ones take some
queries at a time: the forward pass keeps `q, k, v, y` and one number a query (the logarithm of the
softmax's denominator), the backward pass computes each block of `P` again. The rule is that of
FlashAttention (Dao et al., NeurIPS 2022, arXiv 2205.14135; Rabe and Staats, arXiv 2112.05682).
Without a normaliser over the keys `P` is linear in `S`, and `q (k^T v)` replaces `(q k^T) v`
(Shen et al., arXiv 1812.01243, among others).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax import checks
from attention_jax.functional import attention_kernels, cost
from attention_jax.functional.broadcast import expand_to
from attention_jax.functional.dtypes import statistics_type

SIMILARITIES = ('dot', 'cosine', 'gaussian')
WEIGHTINGS = ('softmax', 'sigmoid', 'mean', 'none')
IMPLEMENTATIONS = (None, 'xla', 'pallas', 'cudnn')

_PLAIN_SCORES = 2**20  # entries of P a head up to which the plain form is taken
_BLOCK_SCORES = 2**22  # entries of a block of P, all heads and examples together

Pair = tuple[jax.Array, jax.Array]


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
    query, key, value, bias, relative = _prepared(query, key, value, bias, relative)
    checks.choice('implementation', implementation, IMPLEMENTATIONS)
    if chunk_size is not None:
        checks.at_least('chunk_size', chunk_size, 1)
    query, key, norms, kind, scale = _similarity(query, key, similarity, weighting, scale)
    batch, (n, d), (m, e) = math.prod(query.shape[:-2]), query.shape[-2:], value.shape[-2:]

    if implementation in ('pallas', 'cudnn'):
        reason = attention_kernels.refusal(
            implementation, query, value, kind, norms, bias, relative
        )
        if chunk_size is not None:
            reason = f'it chooses its own blocks, but chunk_size {chunk_size} was given'
        if reason:
            raise ValueError(
                f"implementation {implementation!r} cannot do this: {reason}; use 'xla'"
            )

    if kind == 'linear':
        y = _linear(query, key, value, bias, relative, scale)
        return (y / m if weighting == 'mean' else y).astype(value.dtype)

    cost.add('matmul', batch * n * m * (d + e))
    small = n * m <= _PLAIN_SCORES if chunk_size is None else chunk_size >= n
    chunk = chunk_size or _chunk_size(batch, n, m)
    arrays = (query, key, value, norms, bias, relative)
    if implementation == 'pallas':
        y = attention_kernels.pallas(query, key, value, scale=scale)
    elif implementation == 'cudnn':
        y = attention_kernels.cudnn(query, key, value, scale=scale)
    elif small:
        y = _plain(kind, scale, *arrays)
    elif implementation is None and chunk_size is None:
        y = _fastest(kind, scale, chunk, *arrays)
    else:
        y = _chunked(kind, scale, chunk, *arrays)
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
    """The weights P of `attend`, for a picture of them; give it only the query rows wanted.

    Args:
        query: `[..., n, d]`.
        key: `[..., m, d]`.
        similarity: as in `attend`.
        weighting: as in `attend`.
        scale: as in `attend`.
        bias: as in `attend`.
        relative: as in `attend`.

    Returns:
        `[..., n, m]` in the type of `query`.

    Raises:
        ValueError: as in `attend`.
    """
    dtype = query.dtype
    query, key, _, bias, relative = _prepared(query, key, key, bias, relative)
    query, key, norms, kind, scale = _similarity(query, key, similarity, weighting, scale)
    s = _logits(_dot('...nd,...md->...nm', query, key), norms, bias, relative, scale)
    p, total = _weights(kind, s)
    return (p / (key.shape[-2] if weighting == 'mean' else total)).astype(dtype)


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
    query, key, value, _, _ = _prepared(query, key, value, None, None)
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
        p, total = _weights(kind, jnp.sum(act(pairs) * w, -1))
        return _dot('...nm,...me->...ne', p.astype(value.dtype), value) / total

    chunk = chunk_size or max(min(_BLOCK_SCORES // max(batch * m * d, 1), n), 1)
    if chunk >= n:
        y = block(query, key, value, weight)
    else:
        remembered = jax.checkpoint(block)
        y = lax.map(lambda q: remembered(q, key, value, weight), _split(query, chunk))
        y = _joined(y, n)
    return (y / m if weighting == 'mean' else y).astype(value.dtype)


# Arguments


def broadcast_shape(**shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common leading axes of named arrays; a ValueError that lists them if there are none."""
    try:
        return jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        listing = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
        raise ValueError(f'the leading axes do not fit together: {listing}') from None


def _prepared(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    relative: Pair | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Pair | None]:
    """Checks the shapes; one type and the same leading axes for all; bias `[..., 1, m]`."""
    for name, x in (('query', query), ('key', key), ('value', value)):
        if x.ndim < 2:
            raise ValueError(f'{name} must be [..., positions, features], got shape {x.shape}')
    (n, d), m = query.shape[-2:], key.shape[-2]
    if key.shape[-1] != d:
        raise ValueError(f'key must have the {d} features of the query, got shape {key.shape}')
    if value.shape[-2] != m:
        raise ValueError(f'value must have the {m} positions of the key, got shape {value.shape}')
    checks.at_least('the number of keys', m, 1)
    if bias is not None and bias.shape[-1:] != (m,):
        raise ValueError(f'bias must be [..., m] with the {m} keys, got shape {bias.shape}')
    shapes = {'query': query.shape[:-2], 'key': key.shape[:-2], 'value': value.shape[:-2]}
    if bias is not None:
        shapes['bias'] = bias.shape[:-1]
    if relative is not None:
        rows, columns = relative
        fits = rows.ndim > 1 and columns.ndim > 1 and rows.shape[-2] == columns.shape[-2] == n
        if not fits or rows.shape[-1] * columns.shape[-1] != m:
            raise ValueError(
                f'relative must be [..., n, h] and [..., n, w] with n = {n} and h * w = {m}, '
                f'got shapes {rows.shape} and {columns.shape}'
            )
        shapes |= {'relative[0]': rows.shape[:-2], 'relative[1]': columns.shape[:-2]}
    batch = broadcast_shape(**shapes)
    dtype = jnp.result_type(query, key, value)
    compute = statistics_type(dtype)

    def spread(x: jax.Array, dtype: Any) -> jax.Array:
        return jnp.broadcast_to(x, (*batch, *x.shape[-2:])).astype(dtype)

    if bias is not None:
        bias = spread(bias[..., None, :], compute)
    if relative is not None:
        relative = (spread(relative[0], compute), spread(relative[1], compute))
    return spread(query, dtype), spread(key, dtype), spread(value, dtype), bias, relative


def _similarity(
    query: jax.Array,
    key: jax.Array,
    similarity: str,
    weighting: str,
    scale: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array, Pair | None, str, float]:
    """Reduces every similarity to products: query, key, half squared norms, kind, scale.

    The kind is what happens to the logits: 'softmax', 'sigmoid', 'exp' or 'linear' (nothing).
    """
    checks.choice('similarity', similarity, SIMILARITIES)
    checks.choice('weighting', weighting, WEIGHTINGS)
    kind = 'linear' if weighting in ('mean', 'none') else weighting
    norms = None
    if similarity == 'cosine':
        query, key = _unit(query), _unit(key)
    if similarity == 'gaussian':
        if weighting == 'sigmoid':
            raise ValueError("weighting 'sigmoid' has no meaning for similarity 'gaussian'")
        kind = 'exp' if kind == 'linear' else kind
        compute = statistics_type(query.dtype)
        if query.dtype == compute:
            # Distances do not change, but far from the origin their digits would be lost.
            centre = lax.stop_gradient(key.mean(-2, keepdims=True))
            query, key = query - centre, key - centre
        q2, k2 = (0.5 * jnp.square(x.astype(compute)).sum(-1, keepdims=True) for x in (query, key))
        norms = (q2, jnp.swapaxes(k2, -1, -2))
    if scale is None:
        scale = 1.0 if similarity == 'gaussian' else query.shape[-1] ** -0.5
    if not isinstance(scale, int | float):
        # A scale that may be learned goes into the query, outside the hand-written gradient.
        compute = statistics_type(query.dtype)
        if jnp.ndim(scale):
            raise ValueError(f'scale must be a number or a scalar, got shape {jnp.shape(scale)}')
        if similarity == 'gaussian':
            root = jnp.sqrt(scale).astype(compute)
            query, key = ((x.astype(compute) * root).astype(x.dtype) for x in (query, key))
            norms = jax.tree.map(lambda x: x * scale.astype(compute), norms)
        else:
            query = (query.astype(compute) * scale.astype(compute)).astype(query.dtype)
        scale = 1.0
    return query, key, norms, kind, float(scale)


def _unit(x: jax.Array) -> jax.Array:
    """`x / max(|x|, 1e-12)`; a division by `maximum(norm(x), ...)` has gradient NaN at 0."""
    wide = x.astype(statistics_type(x.dtype))
    square = jnp.square(wide).sum(-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


# The mathematics


def _dot(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """Einsum of arrays of one type with float32 (float64) sums and result."""
    return jnp.einsum(subscripts, *arrays, preferred_element_type=statistics_type(arrays[0].dtype))


def _logits(
    products: jax.Array,
    norms: Pair | None,
    bias: jax.Array | None,
    relative: Pair | None,
    scale: float,
) -> jax.Array:
    """S from the products `q.k [..., n, m]`."""
    if norms is not None:
        products = jnp.minimum(products - norms[0] - norms[1], 0.0)  # -|q - k|^2 / 2
    s = products * scale
    if bias is not None:
        s = s + bias
    if relative is not None:
        rows, columns = relative
        s = s + (rows[..., :, None] + columns[..., None, :]).reshape(s.shape)
    return s


def _weights(kind: str, s: jax.Array) -> Pair:
    """P without its normaliser `[..., n, m]`, and the normaliser `[..., n, 1]` (or 1)."""
    if kind == 'softmax':
        p = jnp.exp(s - _top(s))
        total = p.sum(-1, keepdims=True)
        return p, jnp.where(total == 0, 1, total)
    activation = {'sigmoid': jax.nn.sigmoid, 'exp': jnp.exp, 'linear': lambda s: s}[kind]
    return activation(s), jnp.ones((1,) * s.ndim, s.dtype)


def _top(s: jax.Array) -> jax.Array:
    """Largest logit of each row: finite also where all keys are taken out. It cancels in P."""
    return jnp.maximum(lax.stop_gradient(s).max(-1, keepdims=True), jnp.finfo(s.dtype).min)


def _plain(
    kind: str,
    scale: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    norms: Pair | None,
    bias: jax.Array | None,
    relative: Pair | None,
) -> jax.Array:
    s = _logits(_dot('...nd,...md->...nm', query, key), norms, bias, relative, scale)
    p, total = _weights(kind, s)
    # Dividing after the product: one pass less over [n, m], forward and backward.
    return _dot('...nm,...me->...ne', p.astype(value.dtype), value) / total


def _linear(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    relative: Pair | None,
    scale: float,
) -> jax.Array:
    """`S v` for the S of `_logits`, in the cheaper order of multiplication."""
    batch, (n, d), (m, e) = math.prod(query.shape[:-2]), query.shape[-2:], value.shape[-2:]
    if n * m * (d + e) <= (n + m) * d * e:  # then n m is at most (n + m) min(d, e)
        cost.add('matmul', batch * n * m * (d + e))
        return _plain('linear', scale, query, key, value, None, bias, relative)
    cost.add('matmul', batch * (n + m) * d * e)
    compute = statistics_type(value.dtype)
    y = _dot('...nd,...de->...ne', query.astype(compute), _dot('...md,...me->...de', key, value))
    y = y * scale
    wide = value.astype(compute)
    if bias is not None:
        y = y + _dot('...im,...me->...ie', bias, wide)
    if relative is not None:
        rows, columns = relative
        grid = wide.reshape(*wide.shape[:-2], rows.shape[-1], columns.shape[-1], e)
        y = y + _dot('...nh,...he->...ne', rows, grid.sum(-2))
        y = y + _dot('...nw,...we->...ne', columns, grid.sum(-3))
    return y


# Some queries at a time


def _chunk_size(batch: int, n: int, m: int) -> int:
    """Queries taken at a time, and about the same number in every chunk."""
    # Never under 32: a block of 32 queries is half as large as keys of 64 features are.
    most = min(max(_BLOCK_SCORES // max(batch * m, 1), 32), 256, max(n, 1))
    return math.ceil(n / math.ceil(n / most))


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """`[..., n, f] -> [chunks, ..., chunk, f]`, filled up with zeros; batch axes stay in place."""
    n = x.shape[-2]
    chunks = math.ceil(n / chunk)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, chunks * chunk - n), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], chunks, chunk, x.shape[-1]), -3, 0)


def _joined(x: jax.Array, n: int) -> jax.Array:
    """`[chunks, ..., chunk, f] -> [..., n, f]`, the inverse of `_split`."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :n, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(kind: str, scale: float, chunk: int, *arrays: Any) -> jax.Array:
    """`_plain` on `chunk` queries at a time; the arguments after `chunk` are its own."""
    return _chunked_forward(kind, scale, chunk, *arrays)[0]


def _chunked_forward(
    kind: str,
    scale: float,
    chunk: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    norms: Pair | None,
    bias: jax.Array | None,
    relative: Pair | None,
) -> tuple[jax.Array, Any]:
    query_norms, key_norms = norms or (None, None)

    def block(rows: Any) -> Pair:
        q, q2, relative = rows
        norms = None if q2 is None else (q2, key_norms)
        s = _logits(_dot('...nd,...md->...nm', q, key), norms, bias, relative, scale)
        p, total = _weights(kind, s)
        y = _dot('...nm,...me->...ne', p.astype(value.dtype), value) / total
        log_total = _top(s) + jnp.log(total) if kind == 'softmax' else jnp.zeros_like(y[..., :1])
        return y.astype(value.dtype), log_total

    rows = jax.tree.map(lambda x: _split(x, chunk), (query, query_norms, relative))
    y, log_total = jax.tree.map(lambda x: _joined(x, query.shape[-2]), lax.map(block, rows))
    # In its own type: a TPU would rather rearrange the float32 of what is computed from it.
    y = lax.optimization_barrier(y)
    return y, (query, key, value, norms, bias, relative, y, log_total)


def _chunked_backward(kind: str, scale: float, chunk: int, residuals: Any, g: jax.Array) -> Any:
    query, key, value, norms, bias, relative, y, log_total = residuals
    query_norms, key_norms = norms or (None, None)
    compute = log_total.dtype

    def block(sums: Any, rows: Any) -> Any:
        q, q2, relative, g, y, log_total = rows

        def logits(products: jax.Array, q2: Any, k2: Any, bias: Any, relative: Any) -> jax.Array:
            return _logits(products, None if q2 is None else (q2, k2), bias, relative, scale)

        products = _dot('...nd,...md->...nm', q, key)
        s, pull = jax.vjp(logits, products, q2, key_norms, bias, relative)
        dp = _dot('...ne,...me->...nm', g, value)
        if kind == 'softmax':
            p = jnp.exp(s - log_total)
            ds = p * (dp - (g.astype(compute) * y.astype(compute)).sum(-1, keepdims=True))
        elif kind == 'sigmoid':
            p = jax.nn.sigmoid(s)
            ds = p * (1 - p) * dp
        else:
            p = jnp.exp(s)
            ds = p * dp
        dproducts, dq2, dk2, dbias, drelative = pull(ds)
        dproducts = dproducts.astype(key.dtype)
        dk = _dot('...nm,...nd->...md', dproducts, q)
        dv = _dot('...nm,...ne->...me', p.astype(value.dtype), g)
        dq = _dot('...nm,...md->...nd', dproducts, key).astype(q.dtype)
        return jax.tree.map(jnp.add, sums, (dk, dv, dk2, dbias)), (dq, dq2, drelative)

    n = query.shape[-2]
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, compute), (key, value, key_norms, bias))
    rows = jax.tree.map(lambda x: _split(x, chunk), (query, query_norms, relative, g, y, log_total))
    (dk, dv, dk2, dbias), per_query = lax.scan(block, sums, rows)
    dq, dq2, drelative = jax.tree.map(lambda x: _joined(x, n), per_query)
    dnorms = None if norms is None else (dq2, dk2)
    return dq, dk.astype(key.dtype), dv.astype(value.dtype), dnorms, dbias, drelative


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _fastest(kind: str, scale: float, chunk: int, *arrays: Any) -> jax.Array:
    """A kernel where there is one for the device and the problem, else chunks."""
    query, key, value, norms, bias, relative = arrays

    def possible(name: str) -> bool:
        return not attention_kernels.refusal(name, query, value, kind, norms, bias, relative)

    if possible('cudnn'):  # traced on no other backend: the call itself asks for a GPU
        return attention_kernels.cudnn(query, key, value, scale=scale)
    if not possible('pallas'):
        return _chunked(kind, scale, chunk, *arrays)

    def chunked(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return _chunked(kind, scale, chunk, query, key, value, None, None, None)

    kernel = functools.partial(attention_kernels.pallas, scale=scale)
    return lax.platform_dependent(query, key, value, tpu=kernel, default=chunked)
