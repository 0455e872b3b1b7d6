"""The operands of latent attention, shared by the op and its kernels.

Letters: B batch, T queries, S keys, H heads, J KV heads, N nope, R rope, V value.
"""

from typing import NamedTuple

from jax import Array

Queries = tuple[Array, Array | None]  # q_nope [B, H, T, N], q_rope [B, H, T, R]
Keys = tuple[Array, Array | None]  # k_nope [B, J, S, N], k_rope [B, S, R]
Segments = tuple[Array, Array]  # of the queries [B, T], of the keys [B, S]


class AttentionInputs(NamedTuple):
    """All arrays of a call; offset is an int32 scalar, the slot of the first query."""

    q_nope: Array
    q_rope: Array | None
    k_nope: Array
    k_rope: Array | None
    v: Array
    segments_BT: Array
    segments_BS: Array
    offset: Array
