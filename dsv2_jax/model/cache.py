"""What generation remembers of each token: the latent and the shared rope key with MLA, keys and values with GQA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Model
from dsv2_jax.model.matmul import from_bits, to_bits

Layer = dict[str, Array]  # {"latent_BSC", "rope_BSR"} with MLA; {"key_BSJR", "value_BSJV"} with GQA


class Cache(NamedTuple):
    """Slots 0 to `length` - 1 of every row are filled.

    layers: one entry a layer. segments_BS int32: what each slot belongs to; 0 is padding, which nobody else attends.
    length int32 []: all rows are written at the same slot, so shorter prompts are padded on the left.
    """

    layers: tuple[Layer, ...]
    segments_BS: Array
    length: Array


def empty(model: Model, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache for `rows` sequences of up to `slots` tokens: d_c + d_h^R numbers a token and layer with MLA (2.1.4)."""
    a = model.attention
    if a.kind == "mla":
        shapes = {"latent_BSC": (rows, slots, a.kv_lora_rank), "rope_BSR": (rows, slots, a.qk_rope_head_dim)}
    else:
        shapes = {
            "key_BSJR": (rows, slots, a.num_key_value_heads, a.qk_rope_head_dim),
            "value_BSJV": (rows, slots, a.num_key_value_heads, a.v_head_dim),
        }
    layers = tuple({k: jnp.zeros(s, dtype) for k, s in shapes.items()} for _ in range(model.num_hidden_layers))
    return Cache(layers, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))


def write(buffer_BS: Array, rows_BT: Array, offset: Array | int) -> Array:
    """The buffer [B, S, ...] with slots offset to offset + T - 1 replaced by rows [B, T, ...]."""
    start = (0, offset) + (0,) * (buffer_BS.ndim - 2)
    rows = to_bits(rows_BT.astype(buffer_BS.dtype))
    return from_bits(jax.lax.dynamic_update_slice(to_bits(buffer_BS), rows, start))
