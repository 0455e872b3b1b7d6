"""Latent attention over a paged cache: absorbed queries, ragged sequences, decode tokens beside prefill chunks.

T query tokens of all sequences, H heads, C latent, R rope dim, N sequences, P pages of a sequence, L pages in all, K
slots of a page.
"""

from typing import Literal

from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuning
from pallas_kernels.latent_attention import decode_kernel, reference_decode
from pallas_kernels.latent_attention.decode_kernel import Blocks


def decode(
    q_THC: Array,
    q_THR: Array,
    latent_LKC: Array,
    rope_LRK: Array,
    table_NP: Array,
    lengths_N: Array,
    starts_N1: Array,
    *,
    scale: float,
    implementation: Literal["pallas", "xla"] | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """softmax(scale (q_c c^T + q_r r^T)) c in float32, [T, H, C] in q's dtype: section 2.1's absorbed form.

    q_THC: queries times the key's up-projection; q_THR: their rope part. The cache is paged and not padded: latents
    [L, K, C] and rope keys [L, R, K], transposed so that they fill whole tiles. Sequence n has its first lengths[n]
    slots filled, in the order of its pages table[n]; its queries are rows starts[n] to starts[n + 1] - 1, the last of
    them at slot lengths[n] - 1, each seeing the slots up to its own. Rows from starts[N] on are padding and give zero.
    table, lengths and starts are int32. Slots and pages that are in no sequence may hold anything.

    implementation: "pallas" where there is a TPU, else "xla", unless named. blocks: those of tuning.py unless given.
    Raises ValueError for "pallas" off a TPU, or with pages that are not a multiple of 128 slots.
    """
    chip = chips.here()
    if (implementation or ("pallas" if chip else "xla")) == "xla":
        return reference_decode.decode(q_THC, q_THR, latent_LKC, rope_LRK, table_NP, lengths_N, starts_N1, scale=scale)
    if chip is None:
        raise ValueError("implementation='pallas' needs a TPU; 'xla' runs everywhere")
    return decode_kernel.decode(
        q_THC,
        q_THR,
        latent_LKC,
        rope_LRK,
        table_NP,
        lengths_N,
        starts_N1,
        scale=scale,
        blocks=blocks or tuning.latent_decode(chip, q_THC.shape[1], latent_LKC.shape[1]),
        cores=pltpu.get_tpu_info().num_cores,
    )
