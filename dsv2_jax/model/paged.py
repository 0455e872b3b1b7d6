"""What generation remembers, in pages, and attention over it: tokens of many sequences in one call.

A page holds K slots, a slot one token of one sequence; a sequence's pages lie anywhere, in the order of its table. The
arrays are laid out as the TPU kernel of pallas_kernels/latent_attention/decode.py reads them. Page 0 is nobody's:
padding is written there. Letters beside those of parameters.py:

    L pages in all   K slots of a page   N sequences   P pages of a sequence   M blocks of chunk tokens
    X sequences or blocks at a time      A query rows that share a key head
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.config import Mesh, Model
from dsv2_jax.model import formats, rope, streams
from dsv2_jax.model.formats import Format
from dsv2_jax.model.layers import Kernels
from dsv2_jax.model.matmul import Weight, from_bits, to_bits, whole
from dsv2_jax.parallel.mesh import platform
from pallas_kernels.latent_attention import CachePages, Sequences, latent_decode, packing

_BLOCK = 32  # tokens of a block of a chunk
_TOGETHER = 8  # sequences of one new token that a turn on CPU looks at: fewer steps, and products in one call
_BY_HEAD = {"w_uk_CHN": ("w_uk_HCN", (1, 0, 2)), "w_uv_CHV": ("w_uv_HVC", (1, 2, 0))}
_MASKED = -1e30
_FLOAT32: Any = {"preferred_element_type": jnp.float32}

# {"latent_LKC", "rope_LRK"} with MLA, {"key_LKJR", "value_LKJV"} with GQA; in fewer bits "scales_L1K" or "scales_LKJ"
Layer = dict[str, Array]
_SLOTS_LAST = ("rope_LRK", "scales_L1K")


class Plan(NamedTuple):
    """Where the T tokens of a call stand, int32. The first N are one of each sequence, the rest a chunk in blocks.

    table_NP: pages of each sequence, padded with 0. page_T: the page each token is written to, 0 for padding.
    times_T: its position in its sequence. blocks_M: the sequence of each block; those from `used` on are padding.
    """

    table_NP: Array
    page_T: Array
    times_T: Array
    blocks_M: Array
    used: Array


class Cache(NamedTuple):
    """The pages of all layers, the plan of a call, and the format that rows are kept in."""

    layers: tuple[Layer, ...]
    plan: Plan
    form: Format


class Where(NamedTuple):
    """A plan with what layers read of a call besides: RoPE's cos and sin, and segments [1, T], 0 for padding.

    kernels: what reads the pages; of GQA's there is no kernel.
    """

    phases_BTR: tuple[Array, Array]
    segments_BT: Array
    plan: Plan
    form: Format
    kernels: Kernels = "xla"


def empty(model: Model, mesh: Mesh, pages: int, slots: int, form: Format, dtype: jnp.dtype) -> tuple[Layer, ...]:
    """A cache of `pages` pages of `slots` tokens: d_c + d_h^R numbers a token and layer with MLA (section 2.1.4).

    With a tensor axis, keys and values of GQA are this device's heads; the latent is whole on every device. Raises
    ValueError if the format cannot hold the model's rows.
    """
    a, stored = model.attention, formats.stored(form, dtype)
    if a.kind == "mla":
        sizes = {
            "latent_LKC": (pages, slots, packing.width(a.kv_lora_rank, stored)),
            "rope_LRK": (pages, packing.width(a.qk_rope_head_dim, stored), slots),
        }
        scales = {"scales_L1K": (pages, 1, slots)}
    else:
        heads = a.num_key_value_heads // mesh.tensor
        sizes = {
            "key_LKJR": (pages, slots, heads, packing.width(a.qk_rope_head_dim, stored)),
            "value_LKJV": (pages, slots, heads, packing.width(a.v_head_dim, stored)),
        }
        scales = {"scales_LKJ": (pages, slots, heads)}

    def layer() -> Layer:
        # As bits, where these are moved: made of the pages in each call, they would be a copy of all.
        arrays = {name: to_bits(jnp.zeros(size, stored)) for name, size in sizes.items()}
        if formats.is_quantized(form):
            arrays |= {name: jnp.zeros(size, jnp.uint32) for name, size in scales.items()}
        return arrays

    return tuple(layer() for _ in range(model.num_hidden_layers))


def block(model: Model, kernels: Kernels) -> int:
    """Tokens of a block of a chunk, all of one sequence: the kernel takes any rows, plain XLA rectangles."""
    return 1 if has_kernel(model, kernels) else _BLOCK


def has_kernel(model: Model, kernels: Kernels) -> bool:
    """Whether a kernel reads the pages, in multiples of 128 slots. kernels: of `layers.kernels`."""
    return kernels == "pallas" and model.attention.kind == "mla"


def latent(
    p: Mapping[str, Weight],
    q_nope_BTHN: Array,
    q_rope_BTHR: Array,
    latent_BTC: Array,
    k_rope_BTR: Array,
    where: Where,
    layer: Layer,
    model: Model,
) -> tuple[Array, Layer]:
    """MLA before W^O in its absorbed form (App. C), [1, T, H, V], and the layer's cache with these tokens written.

    p: W^UK and W^UV as `by_head` leaves them.
    """
    dtype = q_nope_BTHN.dtype
    layer = _write(layer, {"latent_LKC": latent_BTC[0], "rope_LRK": k_rope_BTR[0]}, where)
    q_THC = jnp.einsum("thn,hcn->thc", q_nope_BTHN[0], whole(p["w_uk_HCN"], dtype), **_FLOAT32).astype(dtype)
    if has_kernel(model, where.kernels):
        o_THC = _kernel(q_THC, q_rope_BTHR[0], layer, where.plan, rope.softmax_scale(model))
    else:
        heads = (q_THC[:, None], q_rope_BTHR[0][:, None])  # all heads share one key
        o_THC = _attend(heads, model.attention.kv_lora_rank, layer, where.plan, _read_latent, rope.softmax_scale(model))
    return jnp.einsum("thc,hvc->thv", o_THC, whole(p["w_uv_HVC"], dtype), **_FLOAT32).astype(dtype)[None], layer


def by_head(unstacked: Any) -> Any:
    """A tree of `transformer.unstack` with W^UK and W^UV head by head: a step would turn them each time."""

    def leaf(name: str, w: Weight) -> tuple[str, Weight]:
        if name not in _BY_HEAD:
            return name, w
        new, order = _BY_HEAD[name]
        return new, jax.tree.map(lambda x: x.transpose(order), w)

    return {part: dict(leaf(*named) for named in p.items()) for part, p in unstacked.items()}


def grouped_queries(
    q_BTHR: Array, k_BTJR: Array, v_BTJV: Array, where: Where, layer: Layer, model: Model
) -> tuple[Array, Layer]:
    """GQA before W^O, [1, T, H, V], and the layer's cache with these tokens' keys and values (App. D.1)."""
    layer = _write(layer, {"key_LKJR": k_BTJR[0], "value_LKJV": v_BTJV[0]}, where)
    t, h, r = q_BTHR.shape[1:]
    heads = (q_BTHR.reshape(t, k_BTJR.shape[2], h // k_BTJR.shape[2], r),)
    o_THV = _attend(heads, model.attention.v_head_dim, layer, where.plan, _read_grouped, rope.softmax_scale(model))
    return o_THV[None], layer


def _write(layer: Layer, rows: dict[str, Array], where: Where) -> Layer:
    """The cache with the tokens' rows [T, ...] in their slots; with MLA, all but the latent is held with slots last."""
    layer, plan = dict(layer), where.plan
    if len(plan.times_T) == 1:  # XLA makes a slice's update of a single row, and copies the whole cache for it
        plan = plan._replace(times_T=jnp.pad(plan.times_T, (0, 1)), page_T=jnp.pad(plan.page_T, (0, 1)))
        rows = {name: jnp.pad(row, ((0, 1), *((0, 0),) * (row.ndim - 1))) for name, row in rows.items()}
    if formats.is_quantized(where.form):
        stored, scales = zip(*(formats.quantize(row, where.form) for row in rows.values()), strict=True)
        words = packing.pair(*scales)
        rows = dict(zip(rows, stored, strict=True))
        rows |= {"scales_L1K": words[:, None]} if words.ndim == 1 else {"scales_LKJ": words}
    for name, row in rows.items():
        slot_T = plan.times_T % layer[name].shape[2 if name in _SLOTS_LAST else 1]
        buffer = layer[name]
        row = to_bits(row.astype(jnp.bfloat16)) if buffer.dtype == jnp.uint16 else row.astype(buffer.dtype)
        at = buffer.at[plan.page_T, :, slot_T] if name in _SLOTS_LAST else buffer.at[plan.page_T, slot_T]
        layer[name] = at.set(row)
    return layer


def _kernel(q_THC: Array, q_THR: Array, layer: Layer, plan: Plan, scale: float) -> Array:
    """The same by the TPU's kernel, to which a sequence is two: its row among the first N, and its rows of the chunk.

    A row that only pads is a sequence of one slot of page 0. Blocks of the chunk must be single tokens there.
    """
    n, scales = plan.table_NP.shape[0], layer.get("scales_L1K")
    pages = CachePages(layer["latent_LKC"], layer["rope_LRK"], scales)
    run = functools.partial(latent_decode, (q_THC, q_THR), pages, scale=scale)
    if not len(plan.blocks_M):
        return run(Sequences(plan.table_NP, 1 + plan.times_T))
    own_NM = (plan.blocks_M == jnp.arange(n)[:, None]) & (jnp.arange(len(plan.blocks_M)) < plan.used)
    counts_N = jnp.sum(own_NM, axis=1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.arange(n, dtype=jnp.int32), n + jnp.cumsum(counts_N) - counts_N, n + plan.used[None]])
    last_N = jnp.max(jnp.where(own_NM, plan.times_T[n:], 0), axis=1, initial=0)
    lengths = 1 + jnp.concatenate([plan.times_T[:n], last_N])
    return run(Sequences(plan.table_NP, lengths, starts))


def _read_latent(layer: Layer, page_X: Array) -> tuple[tuple[Array, ...], Array]:
    c_XKC, r_XRK = (_take(layer[name], page_X) for name in ("latent_LKC", "rope_LRK"))
    if "scales_L1K" in layer:
        c_XK, r_XK = packing.scales(_take(layer["scales_L1K"], page_X)[:, 0], c_XKC.dtype)
        c_XKC, r_XRK = packing.dequantize(c_XKC, c_XK), packing.dequantize(r_XRK, r_XK, axis=1)
    return (c_XKC[:, None], r_XRK.swapaxes(1, 2)[:, None]), c_XKC[:, None]


def _read_grouped(layer: Layer, page_X: Array) -> tuple[tuple[Array, ...], Array]:
    k_XKJR, v_XKJV = (_take(layer[name], page_X) for name in ("key_LKJR", "value_LKJV"))
    if "scales_LKJ" in layer:
        k_XKJ, v_XKJ = packing.scales(_take(layer["scales_LKJ"], page_X), k_XKJR.dtype)
        k_XKJR, v_XKJV = packing.dequantize(k_XKJR, k_XKJ), packing.dequantize(v_XKJV, v_XKJ)
    return (k_XKJR.swapaxes(1, 2),), v_XKJV.swapaxes(1, 2)


def _take(array: Array, page_X: Array) -> Array:
    """A whole page of each sequence."""
    return from_bits(array.at[page_X].get(mode="promise_in_bounds"))


Read = Callable[[Layer, Array], tuple[tuple[Array, ...], Array]]


def _attend(q_TJG: tuple[Array, ...], width: int, layer: Layer, plan: Plan, read: Read, scale: float) -> Array:
    """softmax(scale q k^T) v over each token's own sequence up to itself, [T, H, width] in the queries' dtype.

    q_TJG: parts of the queries [T, J, G, ...], whose products with the parts of the keys add up. read: keys
    [X, J, K, ...] and values [X, J, K, width] of a page of each sequence.
    """
    n = plan.table_NP.shape[0]
    some = functools.partial(_online, width=width, layer=layer, read=read, scale=scale)
    rows = jnp.arange(n, dtype=jnp.int32)
    out = [_over_blocks(some, [q[:n] for q in q_TJG], rows, jnp.int32(n), plan.times_T[:n], plan.table_NP, width)]
    if len(plan.times_T) > n:
        q = [q[n:] for q in q_TJG]
        out.append(_over_blocks(some, q, plan.blocks_M, plan.used, plan.times_T[n:], plan.table_NP, width))
    return jnp.concatenate(out).astype(q_TJG[0].dtype)


def _over_blocks(
    some: Callable[..., Array],
    q_TJG: list[Array],
    sequences_M: Array,
    used: Array,
    times_T: Array,
    table_NP: Array,
    width: int,
) -> Array:
    """`some` of all blocks of tokens, [T, H, width] in float32; what is behind the used ones holds anything.

    On CPU a loop, in parts that threads run side by side: a block of a chunk then costs what its own sequence is long,
    and some single tokens what the longest of their sequences is. Turns are dealt out one by one, so that a few keep
    all threads busy. Elsewhere: all at once.
    """
    tokens, j, g = q_TJG[0].shape[:3]
    m = len(sequences_M)
    size = tokens // m
    loops, ways = platform() == "cpu", len(streams.ranges(m))
    x = (min(_TOGETHER, -(-m // ways)) if size == 1 else 1) if loops else m
    turns = -(-m // (ways * x))
    missing = ways * turns * x - m
    sequences_M = jnp.pad(sequences_M, (0, missing))
    times_T = jnp.pad(times_T, (0, missing * size))
    q_TJG = [jnp.pad(q, ((0, missing * size), *((0, 0),) * (q.ndim - 1))) for q in q_TJG]

    def part(first: int) -> Array:
        def turn(i: Array, out: Array) -> Array:
            at = (first + i * ways) * x
            q_TJGK = [lax.dynamic_slice_in_dim(q, at * size, x * size) for q in q_TJG]
            q_XJA = [q.reshape(x, size, j, g, -1).swapaxes(1, 2).reshape(x, j, size * g, -1) for q in q_TJGK]
            times_XS = lax.dynamic_slice_in_dim(times_T, at * size, x * size).reshape(x, size)
            pages_XP = table_NP[lax.dynamic_slice_in_dim(sequences_M, at, x)]
            o_XJA = some(q_XJA, pages_XP, jnp.repeat(times_XS, g, axis=1))
            o = o_XJA.reshape(x, j, size, g, width).swapaxes(1, 2).reshape(x * size, j * g, width)
            return lax.dynamic_update_index_in_dim(out, o, i, 0)

        count = jnp.clip((used + x - 1) // x - first + ways - 1, 0) // ways if loops else 1
        return lax.fori_loop(0, count, turn, jnp.zeros((turns, x * size, j * g, width), jnp.float32))

    return jnp.stack([part(first) for first in range(ways)], axis=1).reshape(-1, j * g, width)[:tokens]


def _online(
    q_XJA: list[Array],
    pages_XP: Array,
    times_XA: Array,
    *,
    width: int,
    layer: Layer,
    read: Read,
    scale: float,
) -> Array:
    """[X, J, A, width] in float32: a softmax put together in a loop over as many pages as the longest sequence has."""
    (x, j, a), dtype, slots = q_XJA[0].shape[:3], q_XJA[0].dtype, _slots(layer)

    def turn(i: Array, carry: tuple) -> tuple:
        o, top, total = carry
        keys, values = read(layer, lax.dynamic_index_in_dim(pages_XP, i, 1, keepdims=False))
        parts = zip(q_XJA, keys, strict=True)
        scores = sum(jnp.einsum("xjac,xjkc->xjak", q, k.astype(dtype), **_FLOAT32) for q, k in parts)
        sees_XAK = i * slots + jnp.arange(slots) <= times_XA[..., None]
        scores = jnp.where(sees_XAK[:, None], scores * scale, _MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        p, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
        part = jnp.einsum("xjak,xjkv->xjav", p.astype(dtype), values.astype(dtype), **_FLOAT32)
        return o * fade + part, higher, total * fade + jnp.sum(p, axis=-1, keepdims=True)

    zero = jnp.zeros((x, j, a, 1), jnp.float32)
    begin = jnp.zeros((x, j, a, width), jnp.float32), zero + _MASKED, zero
    o, _, total = lax.fori_loop(0, jnp.max(times_XA) // slots + 1, turn, begin)
    return o / total


def _slots(layer: Layer) -> int:
    """Slots of a page."""
    return next(array.shape[1] for name, array in layer.items() if name not in _SLOTS_LAST)
