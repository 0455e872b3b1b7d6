"""The paged cache that decode.py reads: which row of a call is which slot, and writing new tokens to their slots.

Letters as in decode.py.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Rows(NamedTuple):
    """Where the T rows of a call belong; rows of padding are of the last sequence, and `real` is false for them."""

    sequence_T: Array  # int32
    slot_T: Array  # int32, of that sequence
    real_T: Array


def rows(lengths_N: Array, starts_N1: Array, t: int) -> Rows:
    """Sequence and slot of each of t rows, given lengths and starts as decode.decode takes them."""
    rows_T = jnp.arange(t, dtype=jnp.int32)
    n_T = jnp.clip(jnp.searchsorted(starts_N1, rows_T, side="right").astype(jnp.int32) - 1, 0, lengths_N.shape[0] - 1)
    return Rows(n_T, lengths_N[n_T] - (starts_N1[n_T + 1] - rows_T), rows_T < starts_N1[-1])


def append(
    latent_LKC: Array,
    rope_LRK: Array,
    c_TC: Array,
    r_TR: Array,
    table_NP: Array,
    lengths_N: Array,
    starts_N1: Array,
) -> tuple[Array, Array]:
    """The cache with latents [T, C] and rotated rope keys [T, R] of this call's tokens at their slots.

    table, lengths (these tokens included) and starts as decode.decode takes them; padding rows are not written.
    """
    pages, k, _ = latent_LKC.shape
    where = rows(lengths_N, starts_N1, c_TC.shape[0])
    page_T = jnp.where(where.real_T, table_NP[where.sequence_T, where.slot_T // k], pages)  # no such page: dropped
    latent_LKC = latent_LKC.at[page_T, where.slot_T % k].set(c_TC.astype(latent_LKC.dtype), mode="drop")
    rope_LRK = rope_LRK.at[page_T, :, where.slot_T % k].set(r_TR.astype(rope_LRK.dtype), mode="drop")
    return latent_LKC, rope_LRK
