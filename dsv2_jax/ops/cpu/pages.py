"""Attention over a paged cache in loops over pages: each call's cost follows the length of its sequences.

T tokens   J KV heads   G query heads per KV head   X sequences or blocks at a time   A = tokens of a block x G
N sequences   P pages of a sequence   M blocks   K slots of a page
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.ops import pages
from dsv2_jax.ops.cpu import streams
from dsv2_jax.ops.pages import LayerPages, Placement
from dsv2_jax.ops.switch import on_cpu
from pallas_kernels.common import MASKED

_TOGETHER = 8  # sequences with one new token in an iteration on CPU: fewer iterations, and one product for all
_FLOAT32: Any = {"preferred_element_type": jnp.float32}

# Keys in parts [X, J, K, ...] and values [X, J, K, width] of one page of each sequence.
Read = Callable[[LayerPages, Array], tuple[tuple[Array, ...], Array]]


def attention(
    q_TJG: tuple[Array, ...], width: int, layer: LayerPages, placement: Placement, read: Read, scale: float
) -> Array:
    """softmax(scale q k^T) v over each token's own sequence up to itself: [T, J G, width] in the queries' dtype.

    q_TJG: The parts of the queries, [T, J, G, ...]; their products with the parts of the keys add up.
    """
    n = placement.table_NP.shape[0]
    some = functools.partial(_online_softmax, width=width, layer=layer, read=read, scale=scale)
    rows = jnp.arange(n, dtype=jnp.int32)
    table_NP, times_T = placement.table_NP, placement.times_T
    out = [_over_blocks(some, [q[:n] for q in q_TJG], rows, jnp.int32(n), times_T[:n], table_NP, width)]
    if len(times_T) > n:
        q = [q[n:] for q in q_TJG]
        out.append(_over_blocks(some, q, placement.blocks_M, placement.used, times_T[n:], table_NP, width))
    return jnp.concatenate(out).astype(q_TJG[0].dtype)


def _over_blocks(
    some: Callable[..., Array],
    q_TJG: list[Array],
    sequences_M: Array,
    used: Array,
    times_T: Array,
    table_NP: Array,
    width: int,
) -> Array:
    """`some` for all blocks of tokens, [T, J G, width] in float32; rows after the used blocks hold anything.

    On CPU this is a loop, cut into parts that threads run at the same time. The cost of a chunk's block grows with the
    length of its own sequence, that of single tokens in one iteration with the longest of their sequences. Iterations
    go to the parts in turn, so that even a few of them keep all threads busy. Elsewhere all blocks run at once.
    """
    tokens, j, g = q_TJG[0].shape[:3]
    m = len(sequences_M)
    size = tokens // m
    loops, parts = on_cpu(), len(streams.ranges(m))
    x = (min(_TOGETHER, -(-m // parts)) if size == 1 else 1) if loops else m
    iterations = -(-m // (parts * x))
    missing = parts * iterations * x - m
    sequences_M = jnp.pad(sequences_M, (0, missing))
    times_T = jnp.pad(times_T, (0, missing * size))
    q_TJG = [jnp.pad(q, ((0, missing * size), *((0, 0),) * (q.ndim - 1))) for q in q_TJG]

    def part(first: int) -> Array:
        def iteration(i: Array, out: Array) -> Array:
            at = (first + i * parts) * x
            q_TJGK = [lax.dynamic_slice_in_dim(q, at * size, x * size) for q in q_TJG]
            q_XJA = [q.reshape(x, size, j, g, -1).swapaxes(1, 2).reshape(x, j, size * g, -1) for q in q_TJGK]
            times_XS = lax.dynamic_slice_in_dim(times_T, at * size, x * size).reshape(x, size)
            pages_XP = table_NP[lax.dynamic_slice_in_dim(sequences_M, at, x)]
            o_XJA = some(q_XJA, pages_XP, jnp.repeat(times_XS, g, axis=1))
            o = o_XJA.reshape(x, j, size, g, width).swapaxes(1, 2).reshape(x * size, j * g, width)
            return lax.dynamic_update_index_in_dim(out, o, i, 0)

        count = jnp.clip((used + x - 1) // x - first + parts - 1, 0) // parts if loops else 1
        return lax.fori_loop(0, count, iteration, jnp.zeros((iterations, x * size, j * g, width), jnp.float32))

    return jnp.stack([part(first) for first in range(parts)], axis=1).reshape(-1, j * g, width)[:tokens]


def _online_softmax(
    q_XJA: list[Array],
    pages_XP: Array,
    times_XA: Array,
    *,
    width: int,
    layer: LayerPages,
    read: Read,
    scale: float,
) -> Array:
    """[X, J, A, width] in float32: an online softmax over as many pages as the longest sequence has."""
    (x, j, a), dtype, slots = q_XJA[0].shape[:3], q_XJA[0].dtype, pages.slots(layer)

    def add_page(i: Array, carry: tuple) -> tuple:
        o, top, total = carry
        keys, values = read(layer, lax.dynamic_index_in_dim(pages_XP, i, 1, keepdims=False))
        parts = zip(q_XJA, keys, strict=True)
        scores = sum(jnp.einsum("xjac,xjkc->xjak", q, k.astype(dtype), **_FLOAT32) for q, k in parts)
        sees_XAK = i * slots + jnp.arange(slots) <= times_XA[..., None]
        scores = jnp.where(sees_XAK[:, None], scores * scale, MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        p, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
        added = jnp.einsum("xjak,xjkv->xjav", p.astype(dtype), values.astype(dtype), **_FLOAT32)
        return o * fade + added, higher, total * fade + jnp.sum(p, axis=-1, keepdims=True)

    zero = jnp.zeros((x, j, a, 1), jnp.float32)
    begin = jnp.zeros((x, j, a, width), jnp.float32), zero + MASKED, zero
    o, _, total = lax.fori_loop(0, jnp.max(times_XA) // slots + 1, add_page, begin)
    return o / total
