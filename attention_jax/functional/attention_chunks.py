"""Attention on some queries at a time, in memory linear in n and m, forward and backward.

The forward pass keeps `q, k, v, y` and one number a query (the logarithm of the softmax's
denominator), the backward pass computes each block of `P` again. The rule is that of FlashAttention
(Dao et al., NeurIPS 2022, arXiv 2205.14135; Rabe and Staats, arXiv 2112.05682).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from attention_jax.functional import attention_scores as scores
from attention_jax.functional.attention_scores import Operands, Pair
from attention_jax.functional.contract import contract

BLOCK_SCORES = 2**22  # entries of a block of P, all heads and examples together


def chunk_size(batch: int, n: int, m: int) -> int:
    """Queries taken at a time, and about the same number in every chunk."""
    # Never under 32: a block of 32 queries is half as large as keys of 64 features are.
    most = min(max(BLOCK_SCORES // max(batch * m, 1), 32), 256, max(n, 1))
    return math.ceil(n / math.ceil(n / most))


def by_chunks(block: Callable[[Any], Any], chunk: int, rows: Any) -> Any:
    """What `block` makes of arrays `[..., n, f]`, computed on `chunk` queries at a time."""
    n = jax.tree.leaves(rows)[0].shape[-2]
    return _joined(lax.map(block, _split(rows, chunk)), n)


def _split(rows: Any, chunk: int) -> Any:
    """The last chunk is filled up with zeros; batch axes stay in place."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % chunk), (0, 0)])
        return rearrange(x, '... (chunks n) f -> chunks ... n f', n=chunk)

    return jax.tree.map(split, rows)


def _joined(chunks: Any, n: int) -> Any:
    """The first n rows of all chunks: the inverse of `_split`."""
    return jax.tree.map(
        lambda x: rearrange(x, 'chunks ... n f -> ... (chunks n) f')[..., :n, :], chunks
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(kind: str, scale: float, chunk: int, operands: Operands) -> jax.Array:
    """The weighted sum on `chunk` queries at a time, `[..., n, e]` in the type of the value."""
    return _forward(kind, scale, chunk, operands)[0]


def _forward(kind: str, scale: float, chunk: int, operands: Operands) -> tuple[jax.Array, Any]:
    def block(rows: Any) -> Pair:
        q, q2, relative = rows
        part = operands._replace(query=q, query_norms=q2, relative=relative)
        s = scores.scores(part, scale)
        p, total = scores.weights(kind, s)
        y = scores.weighted_sum(p, total, part.value)
        softmax = kind == 'softmax'
        log_total = scores.top(s) + jnp.log(total) if softmax else jnp.zeros_like(y[..., :1])
        return y.astype(part.value.dtype), log_total

    rows = (operands.query, operands.query_norms, operands.relative)
    y, log_total = by_chunks(block, chunk, rows)
    # In its own type: a TPU would rather rearrange the float32 of what is computed from it.
    y = lax.optimization_barrier(y)
    return y, (operands, y, log_total)


def _backward(kind: str, scale: float, chunk: int, residuals: Any, g: jax.Array) -> Any:
    operands, y, log_total = residuals
    query, key, value, query_norms, key_norms, bias, relative = operands
    product = functools.partial(contract, count=None)
    logits = functools.partial(scores.logits, scale)
    compute = log_total.dtype

    def block(sums: Any, rows: Any) -> Any:
        q, q2, relative, g, y, log_total = rows
        products = product('...nd,...md->...nm', q, key)
        s, pull = jax.vjp(logits, products, q2, key_norms, bias, relative)
        dp = product('...ne,...me->...nm', g, value)
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
        dk = product('...nm,...nd->...md', dproducts, q)
        dv = product('...nm,...ne->...me', p.astype(value.dtype), g)
        dq = product('...nm,...md->...nd', dproducts, key).astype(q.dtype)
        return jax.tree.map(jnp.add, sums, (dk, dv, dk2, dbias)), (dq, dq2, drelative)

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, compute), (key, value, key_norms, bias))
    rows = _split((query, query_norms, relative, g, y, log_total), chunk)
    (dk, dv, dk2, dbias), per_query = lax.scan(block, sums, rows)
    dq, dq2, drelative = _joined(per_query, query.shape[-2])
    return (Operands(dq, dk.astype(key.dtype), dv.astype(value.dtype), dq2, dk2, dbias, drelative),)


attend.defvjp(_forward, _backward)
