"""Exact causal attention over packed rows, a block of queries at a time: scores never exist whole, nor are they kept.

The backward pass keeps the result and the logarithm of each softmax's sum and computes the scores again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv2_jax.model import streams
from dsv2_jax.model.matmul import dot, from_bits, to_bits, transpose, weight_gradient

_MASKED = -1e30


def attention(
    q_BTHK: Array,
    k_BSJK: Array,
    v_BSJV: Array,
    *,
    scale: float,
    segments_BT: Array,
    segments_BS: Array,
    offset: int | Array = 0,
) -> Array:
    """softmax(scale q k^T) v in float32, [B, T, H, V] in q's dtype.

    The query at t sits at slot offset + t and sees slot s iff s <= offset + t and their segments (int32) are equal.
    J divides H: each KV head serves H / J heads. A query that sees nothing gives finite values without meaning.
    """
    t = q_BTHK.shape[1]
    if t == 1:
        return _plain(q_BTHK, k_BSJK, v_BSJV, scale, segments_BT, segments_BS, offset)
    if isinstance(offset, int) and offset == 0 and t <= k_BSJK.shape[1]:
        return _causal(q_BTHK, k_BSJK[:, :t], v_BSJV[:, :t], segments_BT, segments_BS[:, :t], scale)
    pad = -k_BSJK.shape[1] % _keys(k_BSJK.shape[1])
    k_BSJK, v_BSJV = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k_BSJK, v_BSJV))
    segments_BS = jnp.pad(segments_BS, ((0, 0), (0, pad)), constant_values=-1)
    return _shifted(q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, jnp.asarray(offset, jnp.int32), scale)


def _plain(
    q_BTHK: Array,
    k_BSJK: Array,
    v_BSJV: Array,
    scale: float,
    segments_BT: Array,
    segments_BS: Array,
    offset: int | Array,
) -> Array:
    b, t, h, _ = q_BTHK.shape
    s, j = k_BSJK.shape[1:3]
    q = q_BTHK.reshape(b, t, j, h // j, -1)
    sees_BTS = (jnp.arange(s) <= jnp.arange(t)[:, None] + offset) & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores = jnp.einsum("btjhk,bsjk->bjhts", q, k_BSJK, preferred_element_type=jnp.float32) * scale
    p = jax.nn.softmax(jnp.where(sees_BTS[:, None, None], scores, _MASKED), axis=-1).astype(q.dtype)
    o = jnp.einsum("bjhts,bsjv->btjhv", p, v_BSJV, preferred_element_type=jnp.float32)
    return o.reshape(b, t, h, -1).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _causal(q_BTHK: Array, k_BTJK: Array, v_BTJV: Array, segments_BT: Array, segments_BS: Array, scale: float) -> Array:
    return _causal_fwd(q_BTHK, k_BTJK, v_BTJV, segments_BT, segments_BS, scale)[0]


class _Group:
    """One KV head of one sequence and the G query heads it serves, as matrices: rows are (token, query head)."""

    def __init__(self, i: Array, heads: int, kv_heads: int, segments_T: Array, segments_S: Array):
        self.b, self.j = i // kv_heads, i % kv_heads
        self.width = heads // kv_heads
        self.segments_T, self.segments_S = segments_T, segments_S

    def read(self, x: Array, heads: int) -> Array:
        """This group's `heads` heads of x [B, T, heads in all, width], as [T * heads, width]."""
        start = (self.b, 0, self.j * heads, 0)
        part = lax.dynamic_slice(to_bits(x), start, (1, x.shape[1], heads, x.shape[3]))
        return from_bits(part.reshape(-1, x.shape[3]))

    def rows(self, start: int, stop: int) -> slice:
        """The rows of the tokens from `start` to `stop`."""
        return slice(start * self.width, stop * self.width)

    def sees(self, start: int, stop: int, queries: int) -> Array:
        """Which query rows of the tokens from `start` to `stop` see which keys up to there; queries along that axis.

        Made in the orientation it is used in: a transposed mask would keep XLA from computing it, and the softmax it is
        fused with, in vectors.
        """
        shape = [stop, stop]
        shape[queries] = (stop - start) * self.width
        times = start + lax.broadcasted_iota(jnp.int32, shape, queries) // self.width
        slots = lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
        segments = jnp.expand_dims(jnp.repeat(self.segments_T[start:stop], self.width), 1 - queries)
        return (slots <= times) & (jnp.expand_dims(self.segments_S[:stop], queries) == segments)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Query blocks as (start, stop): of 128, or longer: at most 16 of them, for compile time."""
    size = max(128, -(-tokens // 16))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _over_groups(
    body: Callable[..., tuple[Array, ...]],
    vectors: Sequence[tuple[Array, int]],
    groups: int,
    results: Sequence[tuple[tuple[int, ...], Any]],
) -> list[Array]:
    """body(i, *vectors of i) of every group i, stacked: arrays [groups, *shape] for each (shape, dtype) of `results`.

    vectors: (x, n) stands for x[i // n]. A turn finds them in the loop's state, where the turn before has put them:
    sliced on the spot, they would be sliced again for every number of the softmax that XLA fuses the slicing with.
    """

    def fetch(i: Array | int) -> tuple[Array, ...]:
        return tuple(lax.dynamic_index_in_dim(x, i // n, 0, keepdims=False) for x, n in vectors)

    def part(start: int, stop: int) -> tuple[Array, ...]:
        def turn(i: Array, state: tuple) -> tuple:
            stacks, now = state
            new = (to_bits(x.astype(dtype)) for x, (_, dtype) in zip(body(i, *now), results, strict=True))
            stacks = [lax.dynamic_update_index_in_dim(s, x, i - start, 0) for s, x in zip(stacks, new, strict=True)]
            return tuple(stacks), fetch(i + 1)

        empty = tuple(to_bits(jnp.zeros((stop - start, *shape), dtype)) for shape, dtype in results)
        return lax.fori_loop(start, stop, turn, (empty, fetch(start)))[0]

    parts = [part(start, stop) for start, stop in streams.ranges(groups)]
    return [jnp.concatenate(stacks) for stacks in zip(*parts, strict=True)]


def _heads_inside(x_GRK: Array, like: Array) -> Array:
    """Rows (token, head) of every group, held as bits, as [B, T, heads in all, width] again."""
    b, t, heads, width = like.shape
    return from_bits(x_GRK.reshape(b, -1, t, heads * b // x_GRK.shape[0], width).swapaxes(1, 2).reshape(like.shape))


def _causal_fwd(
    q_BTHK: Array, k_BTJK: Array, v_BTJV: Array, segments_BT: Array, segments_BS: Array, scale: float
) -> tuple[Array, tuple]:
    (b, t, h, _), j, dtype = q_BTHK.shape, k_BTJK.shape[2], q_BTHK.dtype

    def body(i: Array, segments_T: Array, segments_S: Array) -> tuple[Array, Array]:
        group = _Group(i, h, j, segments_T, segments_S)
        q, k, v = group.read(q_BTHK, h // j), group.read(k_BTJK, 1), group.read(v_BTJV, 1)
        outs, sums = [], []
        for start, stop in _blocks(t):
            scores = dot(q[group.rows(start, stop)], k[:stop], (1, 1)) * scale
            scores = jnp.where(group.sees(start, stop, 0), scores, _MASKED)
            top = jnp.max(scores, axis=1, keepdims=True)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, axis=1, keepdims=True)
            outs.append(dot(p.astype(dtype), v[:stop]) / total)
            sums.append(top[:, 0] + jnp.log(total[:, 0]))
        return jnp.concatenate(outs), jnp.concatenate(sums)

    rows = t * h // j
    vectors = (segments_BT, j), (segments_BS, j)
    o_GRV, lse_GR = _over_groups(body, vectors, b * j, [((rows, v_BTJV.shape[3]), dtype), ((rows,), jnp.float32)])
    # Named, so that a remat policy that keeps them need not run the forward pass again.
    o_BTHV = _heads_inside(o_GRV, jax.ShapeDtypeStruct((b, t, h, v_BTJV.shape[3]), dtype))
    o_BTHV, lse_GR = checkpoint_name(o_BTHV, "attention"), checkpoint_name(lse_GR, "attention")
    return o_BTHV, (q_BTHK, k_BTJK, v_BTJV, segments_BT, segments_BS, o_BTHV, lse_GR)


def _causal_bwd(scale: float, kept: tuple, g_BTHV: Array) -> tuple:
    q_BTHK, k_BTJK, v_BTJV, segments_BT, segments_BS, o_BTHV, lse_GR = kept
    (b, t, h, _), j, dtype = q_BTHK.shape, k_BTJK.shape[2], q_BTHK.dtype

    def body(i: Array, segments_T: Array, segments_S: Array, lse: Array) -> tuple[Array, Array, Array]:
        group = _Group(i, h, j, segments_T, segments_S)
        q, o, g = (group.read(x, h // j) for x in (q_BTHK, o_BTHV, g_BTHV))
        k, v = group.read(k_BTJK, 1), group.read(v_BTJV, 1)
        mean = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=1)
        kt = transpose(k)
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, stop in _blocks(t):
            rows = group.rows(start, stop)
            # Keys down, queries across: then every product below has row-major operands (see weight_gradient).
            scores = jnp.where(group.sees(start, stop, 1), dot(k[:stop], q[rows], (1, 1)) * scale, _MASKED)
            p = jnp.exp(scores - lse[rows])
            ds = (p * (dot(v[:stop], g[rows], (1, 1)) - mean[rows]) * scale).astype(dtype)
            dq.append(dot(kt[:, :stop], ds))
            dk = dk.at[:stop].add(dot(ds, q[rows]))
            dv = dv.at[:stop].add(dot(p.astype(dtype), g[rows]))
        return jnp.concatenate(dq, axis=1).T, dk, dv

    inputs = (q_BTHK, h // j), (k_BTJK, 1), (v_BTJV, 1)
    vectors = (segments_BT, j), (segments_BS, j), (lse_GR, 1)
    stacks = _over_groups(body, vectors, b * j, [((t * heads, x.shape[3]), dtype) for x, heads in inputs])
    return (*(_heads_inside(stack, x) for stack, (x, _) in zip(stacks, inputs, strict=True)), None, None)


_causal.defvjp(_causal_fwd, _causal_bwd)


# Queries behind an offset that is known only when the program runs: keys come in blocks too, those behind the last
# query are never touched, and the softmax is put together block by block.


def _keys(slots: int) -> int:
    """Keys of a block."""
    return min(512, slots)


def _scores(group: _Group, q: Array, k: Array, start: int, stop: int, block: Array, offset: Array) -> Array:
    """Scaled products of the query rows of the tokens from `start` to `stop` with one block of keys, masked."""
    size = _keys(len(group.segments_S))
    slots_S = block * size + jnp.arange(size)
    times = jnp.repeat(jnp.arange(start, stop), group.width)[:, None] + offset
    segments = jnp.repeat(group.segments_T[start:stop], group.width)[:, None]
    sees = (slots_S <= times) & (lax.dynamic_slice_in_dim(group.segments_S, block * size, size) == segments)
    return jnp.where(sees, dot(q, lax.dynamic_slice_in_dim(k, block * size, size), (1, 1)), _MASKED)


def _seen(group: _Group, stop: int, offset: Array) -> Array:
    """How many blocks of keys the tokens before `stop` see any of."""
    size = _keys(len(group.segments_S))
    return jnp.minimum((offset + stop + size - 1) // size, len(group.segments_S) // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _shifted(
    q_BTHK: Array, k_BSJK: Array, v_BSJV: Array, segments_BT: Array, segments_BS: Array, offset: Array, scale: float
) -> Array:
    return _shifted_fwd(q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, scale)[0]


def _shifted_fwd(
    q_BTHK: Array, k_BSJK: Array, v_BSJV: Array, segments_BT: Array, segments_BS: Array, offset: Array, scale: float
) -> tuple[Array, tuple]:
    (b, t, h, _), j, dtype = q_BTHK.shape, k_BSJK.shape[2], q_BTHK.dtype
    size, width = _keys(k_BSJK.shape[1]), v_BSJV.shape[3]

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        o_BTHV, lse_BTH1 = carry
        group = _Group(i, h, j, segments_BT, segments_BS)
        q, k, v = group.read(q_BTHK, h // j), group.read(k_BSJK, 1), group.read(v_BSJV, 1)
        outs, sums = [], []
        for start, stop in _blocks(t):
            rows = q[start * group.width : stop * group.width]

            def keys(block: Array, carry: tuple, rows: Array = rows, start: int = start, stop: int = stop) -> tuple:
                o, top, total = carry
                scores = _scores(group, rows, k, start, stop, block, offset) * scale
                higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
                p, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
                part = dot(p.astype(dtype), lax.dynamic_slice_in_dim(v, block * size, size))
                return o * fade + part, higher, total * fade + jnp.sum(p, axis=1, keepdims=True)

            one = jnp.zeros((len(rows), 1), jnp.float32)
            begin = (jnp.zeros((len(rows), width), jnp.float32), one + 2 * _MASKED, one)
            o, top, total = lax.fori_loop(0, _seen(group, stop, offset), keys, begin)
            outs.append(o / total)
            sums.append(top + jnp.log(total))
        o_BTHV = group.write(o_BTHV, jnp.concatenate(outs).astype(dtype), h // j)
        return o_BTHV, group.write(lse_BTH1, jnp.concatenate(sums), h // j)

    empty = (to_bits(jnp.zeros((b, t, h, width), dtype)), jnp.zeros((b, t, h, 1), jnp.float32))
    bits_BTHV, lse_BTH1 = lax.fori_loop(0, b * j, body, empty)
    o_BTHV, lse_BTH1 = checkpoint_name(from_bits(bits_BTHV), "attention"), checkpoint_name(lse_BTH1, "attention")
    return o_BTHV, (q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, o_BTHV, lse_BTH1)


def _shifted_bwd(scale: float, kept: tuple, g_BTHV: Array) -> tuple:
    q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, o_BTHV, lse_BTH1 = kept
    (b, t, h, _), j, dtype = q_BTHK.shape, k_BSJK.shape[2], q_BTHK.dtype
    size = _keys(k_BSJK.shape[1])

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        group = _Group(i, h, j, segments_BT, segments_BS)
        q, o, lse, g = (group.read(x, h // j) for x in (q_BTHK, o_BTHV, lse_BTH1, g_BTHV))
        k, v = group.read(k_BSJK, 1), group.read(v_BSJV, 1)
        mean = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=1, keepdims=True)
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, stop in _blocks(t):
            rows = slice(start * group.width, stop * group.width)

            def keys(block: Array, carry: tuple, rows: slice = rows, start: int = start, stop: int = stop) -> tuple:
                dq, dk, dv = carry
                at = block * size
                p = jnp.exp(_scores(group, q[rows], k, start, stop, block, offset) * scale - lse[rows])
                dp = dot(g[rows], lax.dynamic_slice_in_dim(v, at, size), (1, 1))
                ds = (p * (dp - mean[rows]) * scale).astype(dtype)
                dk_part, dv_part = weight_gradient(ds, q[rows]), weight_gradient(p.astype(dtype), g[rows])
                return (
                    dq + dot(ds, lax.dynamic_slice_in_dim(k, at, size)),
                    lax.dynamic_update_slice_in_dim(dk, lax.dynamic_slice_in_dim(dk, at, size) + dk_part, at, 0),
                    lax.dynamic_update_slice_in_dim(dv, lax.dynamic_slice_in_dim(dv, at, size) + dv_part, at, 0),
                )

            begin = (jnp.zeros(q[rows].shape, jnp.float32), dk, dv)
            part, dk, dv = lax.fori_loop(0, _seen(group, stop, offset), keys, begin)
            dq.append(part)
        grads = ((jnp.concatenate(dq).astype(dtype), h // j), (dk.astype(dtype), 1), (dv.astype(dtype), 1))
        dq_BTHK, dk_BSJK, dv_BSJV = (group.write(x, new, heads) for x, (new, heads) in zip(carry, grads, strict=True))
        return dq_BTHK, dk_BSJK, dv_BSJV

    start = tuple(to_bits(jnp.zeros_like(x)) for x in (q_BTHK, k_BSJK, v_BSJV))
    return (*(from_bits(x) for x in lax.fori_loop(0, b * j, body, start)), None, None, None)


_shifted.defvjp(_shifted_fwd, _shifted_bwd)
