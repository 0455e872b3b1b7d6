"""Latent attention in plain jnp: what the kernels compute, on any device, all scores at once.

Letters: B batch, T queries, S keys, H heads, J KV heads, G query heads a KV head, N nope, R rope, V value.
"""

import jax
import jax.numpy as jnp
from jax import Array

_MASKED = -1e30


def attention(
    q_nope_BHTN: Array,
    q_rope_BHTR: Array | None,
    k_nope_BJSN: Array,
    k_rope_BSR: Array | None,
    v_BJSV: Array,
    *,
    scale: float,
    segments_BT: Array,
    segments_BS: Array,
    offset: int | Array = 0,
) -> Array:
    """As `latent_attention` of op.py: sums and softmax in float32, weights rounded to the values' dtype."""
    (b, h, t, n), (_, j, s, v) = q_nope_BHTN.shape, v_BJSV.shape
    float32 = {"preferred_element_type": jnp.float32}
    # What padding holds, were it NaN, must not meet a real key or query, not even with weight 0.
    real_BT, real_BS = segments_BT > 0, segments_BS > 0
    q_BJGTN = jnp.where(real_BT[:, None, :, None], q_nope_BHTN, 0).reshape(b, j, h // j, t, n)
    k_BJSN, v_BJSV = (jnp.where(real_BS[:, None, :, None], x, 0) for x in (k_nope_BJSN, v_BJSV))
    scores_BJGTS = jnp.einsum("bjgtn,bjsn->bjgts", q_BJGTN, k_BJSN, **float32)
    if q_rope_BHTR is not None and k_rope_BSR is not None:
        q_BJGTR = jnp.where(real_BT[:, None, :, None], q_rope_BHTR, 0).reshape(b, j, h // j, t, -1)
        k_BSR = jnp.where(real_BS[:, :, None], k_rope_BSR, 0)
        scores_BJGTS += jnp.einsum("bjgtr,bsr->bjgts", q_BJGTR, k_BSR, **float32)
    causal_TS = jnp.arange(s) <= jnp.arange(t)[:, None] + offset
    sees_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None]) & real_BT[:, :, None]
    scores_BJGTS = jnp.where(sees_BTS[:, None, None], scores_BJGTS * scale, _MASKED)
    weights_BJGTS = jax.nn.softmax(scores_BJGTS, axis=-1).astype(v_BJSV.dtype)
    o_BJGTV = jnp.einsum("bjgts,bjsv->bjgtv", weights_BJGTS, v_BJSV, **float32)
    o_BHTV = o_BJGTV.reshape(b, h, t, v).astype(q_nope_BHTN.dtype)
    return jnp.where(jnp.any(sees_BTS, axis=-1)[:, None, :, None], o_BHTV, 0)
