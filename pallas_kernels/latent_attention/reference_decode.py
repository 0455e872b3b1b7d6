"""The plain twin of decode_kernel.py, with its arguments, in jax.numpy: for CPUs, and as its judge."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.latent_attention import packing, pages

_MASKED = -1e30


def decode(
    q_THC: Array,
    q_THR: Array,
    latent_LKC: Array,
    rope_LRK: Array,
    table_NP: Array,
    lengths_N: Array,
    starts_N1: Array | None,
    *,
    scale: float,
    scales_L1K: Array | None,
) -> Array:
    """See decode.decode; products in float32 accumulation, the softmax in float32."""
    slots = table_NP.shape[1] * latent_LKC.shape[1]

    table_NP = jnp.tile(table_NP, (len(lengths_N) // len(table_NP), 1))

    def token(row: tuple[pages.Rows, Array, Array]) -> Array:
        (n, slot, real), q_HC, q_HR = row
        sees_S = (jnp.arange(slots) <= slot) & real
        c_PKC, r_PRK = latent_LKC[table_NP[n]], rope_LRK[table_NP[n]]
        if scales_L1K is not None:
            c_PK, r_PK = packing.scales(scales_L1K[table_NP[n], 0], latent_LKC.dtype)
            c_PKC = packing.dequantize(c_PKC, c_PK).astype(q_HC.dtype)
            r_PRK = packing.dequantize(r_PRK, r_PK, axis=1).astype(q_HR.dtype)
        # Slots nobody wrote may hold anything, NaN included: a weight of zero would not silence that.
        c_SC = jnp.where(sees_S[:, None], c_PKC.reshape(slots, -1), 0)
        r_SR = r_PRK.swapaxes(1, 2).reshape(slots, -1)
        scores_HS = jnp.einsum("hc,sc->hs", q_HC, c_SC, preferred_element_type=jnp.float32)
        scores_HS += jnp.einsum("hr,sr->hs", q_HR, r_SR, preferred_element_type=jnp.float32)
        p_HS = jax.nn.softmax(jnp.where(sees_S, scores_HS * scale, _MASKED), axis=-1)
        return jnp.einsum("hs,sc->hc", p_HS.astype(c_SC.dtype), c_SC, preferred_element_type=jnp.float32)

    starts_N1 = jnp.arange(len(lengths_N) + 1) if starts_N1 is None else starts_N1
    rows = pages.rows(lengths_N, starts_N1, q_THC.shape[0])
    return jax.lax.map(token, (rows, q_THC, q_THR)).astype(q_THC.dtype)
