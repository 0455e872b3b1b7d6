"""The backward kernel: one pass over scores for all five gradients, the keys of a chunk and their sums held in VMEM.

Scores are computed again from the softmax's logarithm, held as [keys, queries] as in the forward pass. The gradients of
a chunk's keys and values stay in VMEM over all queries of all heads that share them, so each is written once, the one
rope key's summed over all heads. Letters as in forward.py; G query heads a KV head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.latent_attention.forward import NN, NT, VMEM_LIMIT, Blocks, dot, join
from pallas_kernels.latent_attention.visibility import LANES, Bounds, mask, meet, same


def _kernel(
    offset_ref,
    chunk_ref,
    queries_ref,
    keys_ref,
    q_refs,
    k_refs,
    v_ref,
    g_ref,
    lse_ref,
    mean_ref,
    segments_queries_ref,
    segments_keys_ref,
    padding_ref,
    before_refs,
    dq_refs,
    dk_refs,
    dv_ref,
    q_ref,
    clean_g_ref,
    turned_ref,
    dq_sum_ref,
    dk_sum_ref,
    dv_sum_ref,
    rope_sum_ref,
    *,
    scale: float,
    blocks: Blocks,
):
    batch, j, group, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    groups, steps = pl.num_programs(3), pl.num_programs(4)
    n = q_refs[0].shape[1]
    first = offset_ref[0] + i * blocks.queries
    start = chunk_ref[0] * blocks.chunk
    queries = Bounds(*queries_ref).at(batch * steps + i)
    per_chunk = blocks.chunk // blocks.keys

    @pl.when((group == 0) & (i == 0))
    def _():
        keep = padding_ref[...] > 0
        for ref, rows in zip(k_refs, (slice(0, n), slice(n, None)), strict=True):
            if ref is not None:
                turned_ref[rows] = jnp.where(keep, ref[...].T, 0).astype(turned_ref.dtype)
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    whole = queries.only > 0

    @pl.when(whole)
    def _():
        q_ref[...] = join(*(None if ref is None else ref[...] for ref in q_refs))
        clean_g_ref[...] = g_ref[...]

    @pl.when(jnp.logical_not(whole))
    def _():
        keep = jnp.broadcast_to(segments_queries_ref[...], (LANES, blocks.queries)).T[:, :1] > 0
        q_ref[...] = jnp.where(keep, join(*(None if ref is None else ref[...] for ref in q_refs)), 0)
        clean_g_ref[...] = jnp.where(keep, g_ref[...], 0)

    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def add(tile: Array, sees: Array | None) -> None:
        keys = pl.ds(tile, blocks.tile)
        k = join(*(None if ref is None else ref[keys] for ref in k_refs))
        s = dot(k, q_ref[...], NT) * (scale * math.log2(math.e))
        p = jnp.exp2(s - lse_ref[...])
        ds = p * (dot(v_ref[keys], clean_g_ref[...], NT) - mean_ref[...])
        if sees is not None:
            p, ds = jnp.where(sees, p, 0), jnp.where(sees, ds, 0)
        p, ds = p.astype(q_ref.dtype), ds.astype(q_ref.dtype)
        dv_sum_ref[keys] += dot(p, clean_g_ref[...], NN)
        dk_sum_ref[keys] += dot(ds, q_ref[...], NN)
        dq_sum_ref[...] += dot(turned_ref[:, keys], ds, NN)

    def step(block: Array, _: None) -> None:
        at = pl.multiple_of(block * blocks.keys, blocks.keys)
        keys = Bounds(*keys_ref).at(batch * (keys_ref.low.shape[0] // pl.num_programs(0)) + chunk_ref[0] * per_chunk + block)
        whole = (start + at + blocks.keys - 1 <= first) & same(queries, keys)

        @pl.when(whole)
        def _():
            for t in range(0, blocks.keys, blocks.tile):
                add(pl.multiple_of(at + t, blocks.tile), None)

        @pl.when(jnp.logical_not(whole) & meet(queries, keys))
        def _():
            for t in range(0, blocks.keys, blocks.tile):
                tile = pl.multiple_of(at + t, blocks.tile)

                @pl.when(start + tile <= first + blocks.queries - 1)
                def _():
                    segments_keys = segments_keys_ref[pl.ds(tile, blocks.tile)]
                    add(tile, mask(segments_keys, segments_queries_ref[...], first - start - tile))

    visible = jnp.clip(pl.cdiv(first + blocks.queries - start, blocks.keys), 0, per_chunk)
    lax.fori_loop(0, visible, step, None)

    # The queries before the first that sees this chunk share its block of dq: it is set once, then added to.
    nearest = _nearest(i, chunk_ref, offset_ref, blocks, steps)

    @pl.when((i == nearest) | (i == 0))
    def _():
        dq = dq_sum_ref[...] * scale
        for ref, rows, before in zip(dq_refs, (slice(0, n), slice(n, None)), before_refs, strict=True):
            if ref is not None:
                new = dq[rows].T
                ref[...] = (new if before is None else before[...] + new).astype(ref.dtype)

    @pl.when((group == groups - 1) & (i == steps - 1))
    def _():
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
        dk_refs[0][...] = (dk_sum_ref[:, :n] * scale).astype(dk_refs[0].dtype)
        if dk_refs[1] is not None:
            rope = dk_sum_ref[:, n:] * scale
            rope_sum_ref[...] = jnp.where(j == 0, rope, rope_sum_ref[...] + rope)
            dk_refs[1][...] = rope_sum_ref[...]


def _nearest(i: Array, chunk_ref, offset_ref, blocks: Blocks, steps: int) -> Array:
    """i, or the first block of queries that sees the chunk: one before it is the same again, which moves nothing."""
    ahead = jnp.maximum(chunk_ref[0] * blocks.chunk - offset_ref[0], 0)
    return jnp.clip(ahead // blocks.queries, i, steps - 1)


def backward(
    q: tuple[Array, Array | None],
    k: tuple[Array, Array | None],
    v_BJSV: Array,
    g_BHTV: Array,
    lse_BH1T: Array,
    mean_BH1T: Array,
    segments_BT: Array,
    segments_BS: Array,
    offset: Array,
    queries: Bounds,
    keys: Bounds,
    *,
    scale: float,
    blocks: Blocks,
    parts: int,
    interpret: bool,
) -> tuple[tuple[Array, Array | None], tuple[Array, Array | None], Array]:
    """Gradients of (q, k, v); the rope key's in float32. mean: sum over V of g o, [B, H, 1, T] float32.

    parts: how many sums of the rope key's gradient are kept apart, so that as many cores can work: divides J.
    """
    s = v_BJSV.shape[2]
    operands = (q, k, v_BJSV, g_BHTV, lse_BH1T, mean_BH1T, segments_BT, segments_BS)
    sweep = functools.partial(
        _sweep, operands, offset, queries, keys, scale=scale, blocks=blocks, parts=parts, interpret=interpret
    )
    if s == blocks.chunk:
        return sweep(jnp.int32(0), None)

    def body(chunk: Array, grads: tuple) -> tuple:
        return sweep(chunk, grads)

    zeros = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(sweep, 0, None))]
    del zeros, body
    raise NotImplementedError
