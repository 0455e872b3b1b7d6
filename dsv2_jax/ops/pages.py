"""The paged cache of generation: its layout, how tokens are written to it and how its pages are read.

A page holds K slots, one token each. The pages of a sequence can be anywhere in the cache; its table lists them in
order. Padding is written to page 0, which belongs to no sequence. The arrays have the layout that the decode kernel of
pallas_kernels/latent_attention reads. Letters in addition to those of parameters.py:

    L pages in total   K slots of a page   N sequences   P pages of a sequence   M blocks of chunk tokens
    X pages read together, one of each sequence
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Mesh, Model
from dsv2_jax.ops import formats
from dsv2_jax.ops.cpu.matmul import from_bits, to_bits
from dsv2_jax.ops.formats import Format
from dsv2_jax.ops.switch import Implementation
from dsv2_jax.parallel.mesh import TENSOR
from pallas_kernels.latent_attention import packing

# {"latent_LKC", "rope_LRK"} for MLA, {"key_LKJR", "value_LKJV"} for GQA; int8 and int6 add "scales_L1K" or "scales_LKJ"
LayerPages = dict[str, Array]

_SLOTS_LAST = ("rope_LRK", "scales_L1K")
_CHUNK_BLOCK = 32  # tokens of a block of a chunk


class Placement(NamedTuple):
    """The cache slots of the T tokens of a call, int32. The first N are one per sequence, the rest a chunk in blocks.

    table_NP: The pages of each sequence, padded with 0.
    page_T: The page that each token is written to, 0 for padding.
    times_T: The position of each token in its sequence.
    blocks_M: The sequence of each block of the chunk; blocks from `used` on are padding.
    """

    table_NP: Array
    page_T: Array
    times_T: Array
    blocks_M: Array
    used: Array


class Cache(NamedTuple):
    """The pages of all layers, the placement of a call's tokens, and the format of the rows."""

    layers: tuple[LayerPages, ...]
    placement: Placement
    form: Format


def empty(model: Model, mesh: Mesh, pages: int, slots: int, form: Format, dtype: jnp.dtype) -> tuple[LayerPages, ...]:
    """A cache of `pages` pages of `slots` tokens. MLA keeps d_c + d_h^R numbers per token and layer (section 2.1.4).

    With tensor parallelism, GQA keeps the keys and values of this device's heads, and MLA keeps all latents.
    Raises ValueError if the format cannot hold the model's rows.
    """
    a, stored = model.attention, formats.stored(form, dtype)
    if a.kind == "mla":
        sizes = {
            "latent_LKC": (pages, slots, packing.width(a.kv_lora_rank, stored)),
            "rope_LRK": (pages, packing.width(a.qk_rope_head_dim, stored), slots),
        }
        scales = {"scales_L1K": (pages, 1, slots)}
    else:
        heads = a.num_key_value_heads // mesh.size(*TENSOR)
        sizes = {
            "key_LKJR": (pages, slots, heads, packing.width(a.qk_rope_head_dim, stored)),
            "value_LKJV": (pages, slots, heads, packing.width(a.v_head_dim, stored)),
        }
        scales = {"scales_LKJ": (pages, slots, heads)}

    def layer() -> LayerPages:
        # On CPU a bfloat16 cache is stored as bits: converting in each call would copy all pages.
        arrays = {name: to_bits(jnp.zeros(size, stored)) for name, size in sizes.items()}
        if formats.is_quantized(form):
            arrays |= {name: jnp.zeros(size, jnp.uint32) for name, size in scales.items()}
        return arrays

    return tuple(layer() for _ in range(model.num_hidden_layers))


def chunk_block(implementation: Implementation) -> int:
    """Tokens of a block of a chunk, all of one sequence; implementation: of `switch.of_pages`.

    The kernel takes any number of tokens per sequence, so its blocks are single tokens. XLA needs blocks of equal size.
    """
    return 1 if implementation == "pallas" else _CHUNK_BLOCK


def write(layer: LayerPages, rows: dict[str, Array], placement: Placement, form: Format) -> LayerPages:
    """A layer's cache after the tokens' rows [T, ...], in the activations' dtype, are written to their slots."""
    layer = dict(layer)
    if len(placement.times_T) == 1:
        # XLA would compile the update of a single row as an update of a slice, and copy the complete cache for it.
        pad = {"times_T": jnp.pad(placement.times_T, (0, 1)), "page_T": jnp.pad(placement.page_T, (0, 1))}
        placement = placement._replace(**pad)
        rows = {name: jnp.pad(row, ((0, 1), *((0, 0),) * (row.ndim - 1))) for name, row in rows.items()}
    if formats.is_quantized(form):
        stored, scales = zip(*(formats.quantize(row, form) for row in rows.values()), strict=True)
        pairs = packing.pair(*scales)
        rows = dict(zip(rows, stored, strict=True))
        rows |= {"scales_L1K": pairs[:, None]} if pairs.ndim == 1 else {"scales_LKJ": pairs}
    for name, row in rows.items():
        slot_T = placement.times_T % layer[name].shape[2 if name in _SLOTS_LAST else 1]
        buffer = layer[name]
        row = to_bits(row.astype(jnp.bfloat16)) if buffer.dtype == jnp.uint16 else row.astype(buffer.dtype)
        at = buffer.at[placement.page_T, :, slot_T] if name in _SLOTS_LAST else buffer.at[placement.page_T, slot_T]
        layer[name] = at.set(row)
    return layer


def read_latent(layer: LayerPages, page_X: Array) -> tuple[tuple[Array, ...], Array]:
    """MLA's keys in parts, [X, 1, K, C] and [X, 1, K, R], and values [X, 1, K, C] of these pages."""
    c_XKC, r_XRK = (_take(layer[name], page_X) for name in ("latent_LKC", "rope_LRK"))
    if "scales_L1K" in layer:
        c_XK, r_XK = packing.scales(_take(layer["scales_L1K"], page_X)[:, 0], c_XKC.dtype)
        c_XKC, r_XRK = packing.dequantize(c_XKC, c_XK), packing.dequantize(r_XRK, r_XK, axis=1)
    return (c_XKC[:, None], r_XRK.swapaxes(1, 2)[:, None]), c_XKC[:, None]


def read_grouped(layer: LayerPages, page_X: Array) -> tuple[tuple[Array, ...], Array]:
    """GQA's keys [X, J, K, R], a single part, and values [X, J, K, V] of these pages."""
    k_XKJR, v_XKJV = (_take(layer[name], page_X) for name in ("key_LKJR", "value_LKJV"))
    if "scales_LKJ" in layer:
        k_XKJ, v_XKJ = packing.scales(_take(layer["scales_LKJ"], page_X), k_XKJR.dtype)
        k_XKJR, v_XKJV = packing.dequantize(k_XKJR, k_XKJ), packing.dequantize(v_XKJV, v_XKJ)
    return (k_XKJR.swapaxes(1, 2),), v_XKJV.swapaxes(1, 2)


def slots(layer: LayerPages) -> int:
    """Slots of a page."""
    return next(array.shape[1] for name, array in layer.items() if name not in _SLOTS_LAST)


def _take(array: Array, page_X: Array) -> Array:
    return from_bits(array.at[page_X].get(mode="promise_in_bounds"))
