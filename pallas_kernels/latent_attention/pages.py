"""The arguments of `latent_decode`: a paged cache and the sequences that read it.

T query tokens of all sequences, C latent, R rope dim, N sequences, P pages per sequence, L pages in total, K slots per
page.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class CachePages(NamedTuple):
    """The cache of one layer. Slots that belong to no sequence may have any values, even NaN.

    latent_LKC and rope_LRK (slots last, so that rope keys fill whole register tiles) are in the queries' dtype, or
    quantized: int8, or 6-bit integers packed in uint8, which makes C and R 3/4 as wide. scales_L1K, uint32, then holds
    both scales of each slot (see packing.py); it is None otherwise.
    """

    latent_LKC: Array
    rope_LRK: Array
    scales_L1K: Array | None = None


class Sequences(NamedTuple):
    """The sequences of a call, int32.

    Sequence n fills its first lengths[n] slots, in the order of its pages table[n]. Its queries are tokens starts[n] to
    starts[n + 1] - 1; the last of them is at slot lengths[n] - 1. Tokens from starts[N] on are padding. Without
    starts every sequence has one query, and T = N. The table may have fewer rows than N if their number divides N:
    sequence n then reads row n % rows, so two sequences may share a row.
    """

    table_NP: Array
    lengths_N: Array
    starts_N1: Array | None = None

    def each_start(self) -> Array:
        """starts_N1, or its values where it is None."""
        return jnp.arange(len(self.lengths_N) + 1, dtype=jnp.int32) if self.starts_N1 is None else self.starts_N1


class TokenSlots(NamedTuple):
    """The slot of each token of a call. Padding belongs to the last sequence, with `real` false."""

    sequence_T: Array  # int32
    slot_T: Array  # int32, within the sequence
    real_T: Array  # bool


def token_slots(sequences: Sequences, tokens: int) -> TokenSlots:
    """Sequence and slot of each of `tokens` tokens."""
    lengths_N, starts_N1 = sequences.lengths_N, sequences.each_start()
    rows_T = jnp.arange(tokens, dtype=jnp.int32)
    n_T = jnp.clip(jnp.searchsorted(starts_N1, rows_T, side="right").astype(jnp.int32) - 1, 0, lengths_N.shape[0] - 1)
    return TokenSlots(n_T, lengths_N[n_T] - (starts_N1[n_T + 1] - rows_T), rows_T < starts_N1[-1])
