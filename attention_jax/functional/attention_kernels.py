"""Attention by kernels that JAX and cuDNN bring: what they can do, and calls of them."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from attention_jax.functional.attention_scores import Operands
from attention_jax.functional.sharding import per_example

_PALLAS_BLOCK = 1024  # most queries and keys of a tile; a multiple of 128


def refusal(implementation: str, kind: str, operands: Operands) -> str:
    """Why a kernel cannot do this; '' if it can."""
    query, _, value, norms, _, bias, relative = operands
    d, e, dtype = query.shape[-1], value.shape[-1], value.dtype
    if implementation == 'cudnn' and jax.default_backend() != 'gpu':
        return f'it needs the gpu backend, this is {jax.default_backend()}'
    if kind != 'softmax' or norms is not None:
        return "it has the weighting 'softmax' of 'dot' and 'cosine' only"
    if bias is not None or relative is not None:
        return 'it takes neither bias nor relative'
    if d != e:
        return f'query and value must have the same width, got {d} and {e}'
    if implementation == 'pallas':
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f'it takes float32 and bfloat16, got {dtype}'
        if d % 8 or not (d <= 128 or d == 256):
            return f'the width must be a multiple of 8 up to 128, or 256, got {d}'
        return ''
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f'it takes float16 and bfloat16, got {dtype}'
    if d % 8 or d > 128:
        return f'the width must be a multiple of 8 up to 128, got {d}'
    return ''


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """Attention of cuDNN, `[b, n, 1, d]`: the first leading axes become the batch."""
    q, k, v = (rearrange(x, '... n d -> (...) n 1 d') for x in (query, key, value))
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation='cudnn')
    return y.reshape(*query.shape[:-1], value.shape[-1])


def pallas(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """JAX's flash attention for TPUs; positions are filled up to whole tiles and masked."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    n, m = query.shape[-2], key.shape[-2]
    tile_n, tile_m = (_tile(length, query.shape[-1]) for length in (n, m))
    sizes = flash.BlockSizes(
        block_q=tile_n, block_k_major=tile_m, block_k=tile_m, block_b=1,
        block_q_major_dkv=tile_n, block_q_dkv=tile_n, block_k_major_dkv=tile_m, block_k_dkv=tile_m,
        block_q_dq=tile_n, block_k_major_dq=tile_m, block_k_dq=tile_m,
    )  # fmt: skip

    def kernel(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = (x[:, None] for x in operands)
        segments = None
        if m % tile_m:  # only equal numbers attend to each other
            queries = jnp.zeros((len(q), q.shape[2]), jnp.int32)
            keys = jnp.broadcast_to(jnp.arange(k.shape[2]) >= m, (len(k), k.shape[2]))
            segments = flash.SegmentIds(queries, keys.astype(jnp.int32))
        return flash.flash_attention(
            q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=sizes
        )[:, 0]

    def flat(x: jax.Array, tile: int) -> jax.Array:
        x = rearrange(x, '... n d -> (...) n d')
        return jnp.pad(x, ((0, 0), (0, -x.shape[-2] % tile), (0, 0)))

    operands = flat(query, tile_n), flat(key, tile_m), flat(value, tile_m)
    return per_example(kernel)(operands)[:, :n].reshape(*query.shape[:-1], value.shape[-1])


def _tile(length: int, width: int) -> int:
    """Positions a tile: large ones, for few reads of the keys, that need the least filling up."""
    most = _PALLAS_BLOCK if width <= 128 else max(_PALLAS_BLOCK // 2, 128)
    if length <= most:
        return math.ceil(length / 128) * 128
    large = range(most, most // 2, -128)
    return min(large, key=lambda tile: math.ceil(length / tile) * tile)
