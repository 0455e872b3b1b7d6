"""Latent attention in plain jnp, the twins of both ops: on any device, with all scores in memory at once.

Letters: B batch, T queries, S keys, H heads, J KV heads, G query heads per KV head, N nope, R rope, V value; for decode
as in pages.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import MASKED
from pallas_kernels.latent_attention import packing
from pallas_kernels.latent_attention.inputs import Keys, Queries, Segments
from pallas_kernels.latent_attention.pages import CachePages, Sequences, TokenSlots, token_slots

_FLOAT32: Any = {"preferred_element_type": jnp.float32}


def latent_attention(
    queries: Queries,
    keys: Keys,
    v_BJSV: Array,
    segments: Segments,
    *,
    scale: float,
    offset: int | Array = 0,
) -> Array:
    """As `latent_attention` of op.py: sums and softmax in float32, weights rounded to the values' dtype."""
    (q_nope_BHTN, q_rope_BHTR), (k_nope_BJSN, k_rope_BSR), (segments_BT, segments_BS) = queries, keys, segments
    (b, h, t, n), (_, j, s, v) = q_nope_BHTN.shape, v_BJSV.shape
    # Padding may hold NaN. A weight of 0 does not remove it, so set it to 0.
    real_BT, real_BS = segments_BT > 0, segments_BS > 0
    q_BJGTN = jnp.where(real_BT[:, None, :, None], q_nope_BHTN, 0).reshape(b, j, h // j, t, n)
    k_BJSN, v_BJSV = (jnp.where(real_BS[:, None, :, None], x, 0) for x in (k_nope_BJSN, v_BJSV))
    scores_BJGTS = jnp.einsum("bjgtn,bjsn->bjgts", q_BJGTN, k_BJSN, **_FLOAT32)
    if q_rope_BHTR is not None and k_rope_BSR is not None:
        q_BJGTR = jnp.where(real_BT[:, None, :, None], q_rope_BHTR, 0).reshape(b, j, h // j, t, -1)
        k_BSR = jnp.where(real_BS[:, :, None], k_rope_BSR, 0)
        scores_BJGTS += jnp.einsum("bjgtr,bsr->bjgts", q_BJGTR, k_BSR, **_FLOAT32)
    causal_TS = jnp.arange(s) <= jnp.arange(t)[:, None] + offset
    sees_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None]) & real_BT[:, :, None]
    scores_BJGTS = jnp.where(sees_BTS[:, None, None], scores_BJGTS * scale, MASKED)
    weights_BJGTS = jax.nn.softmax(scores_BJGTS, axis=-1).astype(v_BJSV.dtype)
    o_BJGTV = jnp.einsum("bjgts,bjsv->bjgtv", weights_BJGTS, v_BJSV, **_FLOAT32)
    o_BHTV = o_BJGTV.reshape(b, h, t, v).astype(q_nope_BHTN.dtype)
    return jnp.where(jnp.any(sees_BTS, axis=-1)[:, None, :, None], o_BHTV, 0)


def latent_decode(
    queries: tuple[Array, Array], pages: CachePages, sequences: Sequences, *, scale: float, blocks: Any = None
) -> Array:
    """As `latent_decode` of decode.py: products accumulate in float32, the softmax is in float32. blocks: not used."""
    del blocks
    (q_THC, q_THR), (latent_LKC, rope_LRK, scales_L1K), (table_NP, lengths_N, _) = queries, pages, sequences
    slots = table_NP.shape[1] * latent_LKC.shape[1]
    table_NP = jnp.tile(table_NP, (len(lengths_N) // len(table_NP), 1))

    def token(row: tuple[TokenSlots, Array, Array]) -> Array:
        (n, slot, real), q_HC, q_HR = row
        sees_S = (jnp.arange(slots) <= slot) & real
        c_PKC, r_PRK = latent_LKC[table_NP[n]], rope_LRK[table_NP[n]]
        if scales_L1K is not None:
            c_PK, r_PK = packing.scales(scales_L1K[table_NP[n], 0], latent_LKC.dtype)
            c_PKC = packing.dequantize(c_PKC, c_PK).astype(q_HC.dtype)
            r_PRK = packing.dequantize(r_PRK, r_PK, axis=1).astype(q_HR.dtype)
        # Unwritten slots may hold NaN. A weight of 0 does not remove it, so set them to 0.
        c_SC = jnp.where(sees_S[:, None], c_PKC.reshape(slots, -1), 0)
        r_SR = r_PRK.swapaxes(1, 2).reshape(slots, -1)
        scores_HS = jnp.einsum("hc,sc->hs", q_HC, c_SC, **_FLOAT32)
        scores_HS += jnp.einsum("hr,sr->hs", q_HR, r_SR, **_FLOAT32)
        p_HS = jax.nn.softmax(jnp.where(sees_S, scores_HS * scale, MASKED), axis=-1)
        return jnp.einsum("hs,sc->hc", p_HS.astype(c_SC.dtype), c_SC, **_FLOAT32)

    return jax.lax.map(token, (token_slots(sequences, q_THC.shape[0]), q_THC, q_THR)).astype(q_THC.dtype)
