"""Attention for the model: over packed rows in training and evaluation, over a paged cache in generation.

Each function takes heads in the layout of the model's equations and runs the implementation that `switch` picked.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Mesh
from dsv2_jax.ops import pages
from dsv2_jax.ops.cpu import attention as cpu
from dsv2_jax.ops.cpu import pages as cpu_pages
from dsv2_jax.ops.formats import Format
from dsv2_jax.ops.pages import LayerPages, Placement
from dsv2_jax.ops.switch import Execution, Implementation
from dsv2_jax.parallel import context
from dsv2_jax.parallel.mesh import CONTEXT
from pallas_kernels.latent_attention import CachePages, Sequences, latent_attention, latent_decode


class PackedTokens(NamedTuple):
    """The tokens of a packed batch.

    phases_BTR: RoPE's cos and sin. segments_BT, segments_BS: int32; a query sees the keys of its own segment, and 0 is
    padding. With context parallelism T are this device's positions and S all positions in text order.
    """

    phases_BTR: tuple[Array, Array]
    segments_BT: Array
    segments_BS: Array


class PagedTokens(NamedTuple):
    """The tokens of a generation call, B = 1: RoPE's cos and sin, segments (0 is padding), and their cache slots."""

    phases_BTR: tuple[Array, Array]
    segments_BT: Array
    placement: Placement
    form: Format


def full(
    q: tuple[Array, Array | None],
    k: tuple[Array, Array | None],
    v_BSJV: Array,
    tokens: PackedTokens,
    *,
    scale: float,
    run: Execution,
) -> Array:
    """softmax(scale (q k^T + q^R k^R^T)) v, causal within segments: [B, T, H, V] in the queries' dtype.

    Args:
      q: [B, T, H, N], and MLA's rotated part [B, T, H, R] or None.
      k: [B, S, J, N], and MLA's rotated part [B, S, R], which all heads share, or None. J divides H.
      v_BSJV: Values of J heads.
      tokens: The segments of queries and keys.
      scale: The softmax scale.
      run: The mesh and the implementation. With context parallelism this device's queries are two chunks of the text.
    """
    segments = tokens.segments_BS
    attend = (
        _kernel(k, v_BSJV, segments, scale) if run.implementation == "pallas" else _loops(k, v_BSJV, segments, scale)
    )
    return _over_chunks(attend, q, tokens.segments_BT, run.mesh)


def paged_latent(
    q: tuple[Array, Array],
    latent_BTC: Array,
    k_rope_BTR: Array,
    tokens: PagedTokens,
    layer: LayerPages,
    *,
    scale: float,
    implementation: Implementation,
) -> tuple[Array, LayerPages]:
    """Writes these tokens to the cache, then computes absorbed MLA over it (App. C).

    q: W^UK times the query, [1, T, H, C], and the rotated part [1, T, H, R]. All heads share the keys [c ; k^R] and the
    values c of the cache. implementation: of `switch.of_pages`. Returns ([1, T, H, C] in the queries' dtype, the
    cache).
    """
    (q_THC, q_THR), placement = (part[0] for part in q), tokens.placement
    layer = pages.write(layer, {"latent_LKC": latent_BTC[0], "rope_LRK": k_rope_BTR[0]}, placement, tokens.form)
    if implementation == "pallas":
        return _decode_kernel(q_THC, q_THR, layer, placement, scale)[None], layer
    heads = (q_THC[:, None], q_THR[:, None])
    o_THC = cpu_pages.attention(heads, q_THC.shape[-1], layer, placement, pages.read_latent, scale)
    return o_THC[None], layer


def paged_grouped(
    q_BTHR: Array, k_BTJR: Array, v_BTJV: Array, tokens: PagedTokens, layer: LayerPages, *, scale: float
) -> tuple[Array, LayerPages]:
    """Writes these tokens to the cache, then computes GQA over it (App. D.1).

    Returns ([1, T, H, V] in the queries' dtype, the cache).
    """
    rows = {"key_LKJR": k_BTJR[0], "value_LKJV": v_BTJV[0]}
    layer = pages.write(layer, rows, tokens.placement, tokens.form)
    t, h, r = q_BTHR.shape[1:]
    heads = (q_BTHR.reshape(t, k_BTJR.shape[2], h // k_BTJR.shape[2], r),)
    o_THV = cpu_pages.attention(heads, v_BTJV.shape[-1], layer, tokens.placement, pages.read_grouped, scale)
    return o_THV[None], layer


# (queries [B, T, H, *] in parts, their segments [B, T], the slot of the first query) -> [B, T, H, V]
_Attend = Callable[[tuple[Array, Array | None], Array, Array | int], Array]


def _over_chunks(attend: _Attend, q: tuple[Array, Array | None], segments_BT: Array, mesh: Mesh) -> Array:
    """`attend` for this device's queries: with context parallelism they are two chunks at different slots."""
    if mesh.size(*CONTEXT) == 1:
        return attend(q, segments_BT, 0)
    halves = zip(*(jnp.split(x, 2, axis=1) if x is not None else (None, None) for x in q), strict=True)
    segments, length = jnp.split(segments_BT, 2, axis=1), segments_BT.shape[1] // 2
    parts = zip(halves, segments, context.chunks(mesh), strict=True)
    return jnp.concatenate([attend(q, segments_BT, at * length) for q, segments_BT, at in parts], axis=1)  # pyright: ignore


def _loops(k: tuple[Array, Array | None], v_BSJV: Array, segments_BS: Array, scale: float) -> _Attend:
    k_BSJN, k_rope_BSR = k
    k_BSJK = k_BSJN
    if k_rope_BSR is not None:
        k_rope_BSJR = jnp.broadcast_to(k_rope_BSR[:, :, None], (*k_BSJN.shape[:3], k_rope_BSR.shape[-1]))
        k_BSJK = jnp.concatenate([k_BSJN, k_rope_BSJR], axis=-1)

    def attend(q: tuple[Array, Array | None], segments_BT: Array, offset: Array | int) -> Array:
        q_BTHK = q[0] if q[1] is None else jnp.concatenate([q[0], q[1]], axis=-1)
        segments = {"segments_BT": segments_BT, "segments_BS": segments_BS}
        return cpu.attention(q_BTHK, k_BSJK, v_BSJV, scale=scale, offset=offset, **segments)

    return attend


def _kernel(k: tuple[Array, Array | None], v_BSJV: Array, segments_BS: Array, scale: float) -> _Attend:
    """The Pallas kernels, which need heads before tokens and a single copy of the shared rope key."""
    k_BJSN, v_BJSV = k[0].swapaxes(1, 2), v_BSJV.swapaxes(1, 2)

    def attend(q: tuple[Array, Array | None], segments_BT: Array, offset: Array | int) -> Array:
        q_BHTN, q_BHTR = q[0].swapaxes(1, 2), None if q[1] is None else q[1].swapaxes(1, 2)
        segments = (segments_BT, segments_BS)
        o_BHTV = latent_attention((q_BHTN, q_BHTR), (k_BJSN, k[1]), v_BJSV, segments, scale=scale, offset=offset)
        return o_BHTV.swapaxes(1, 2)

    return attend


def _decode_kernel(q_THC: Array, q_THR: Array, layer: LayerPages, placement: Placement, scale: float) -> Array:
    """The decode kernel. Each sequence is two sequences of the kernel: its token among the first N, its chunk tokens.

    A padding row is a sequence of one slot of page 0. Blocks of the chunk are single tokens (`pages.chunk_block`).
    """
    n = placement.table_NP.shape[0]
    cache = CachePages(layer["latent_LKC"], layer["rope_LRK"], layer.get("scales_L1K"))
    run = functools.partial(latent_decode, (q_THC, q_THR), cache, scale=scale)
    if not len(placement.blocks_M):
        return run(Sequences(placement.table_NP, 1 + placement.times_T, None))
    used = jnp.arange(len(placement.blocks_M)) < placement.used
    own_NM = (placement.blocks_M == jnp.arange(n)[:, None]) & used
    counts_N = jnp.sum(own_NM, axis=1, dtype=jnp.int32)
    chunk_starts_N = n + jnp.cumsum(counts_N) - counts_N
    starts = jnp.concatenate([jnp.arange(n, dtype=jnp.int32), chunk_starts_N, n + placement.used[None]])
    last_N = jnp.max(jnp.where(own_NM, placement.times_T[n:], 0), axis=1, initial=0)
    lengths = 1 + jnp.concatenate([placement.times_T[:n], last_N])
    return run(Sequences(placement.table_NP, lengths, starts))
