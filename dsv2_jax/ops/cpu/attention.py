"""Exact causal attention over packed rows, one block of queries at a time: scores exist for a block only.

The backward pass recomputes them from the result and the logarithm of each softmax's sum, which the forward pass keeps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv2_jax.ops.cpu import streams
from dsv2_jax.ops.cpu.matmul import dot, from_bits, to_bits, transpose, weight_gradient
from pallas_kernels.common import MASKED


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
    """softmax(scale q k^T) v with a float32 softmax: [B, T, H, V] in q's dtype.

    The query at t is at slot offset + t. It sees slot s if s <= offset + t and their segments (int32) are equal.
    J divides H: each KV head serves H / J heads. A query that sees no key gives finite values without meaning.
    """
    t = q_BTHK.shape[1]
    if isinstance(offset, int) and offset == 0 and t <= k_BSJK.shape[1]:
        return _causal(q_BTHK, k_BSJK[:, :t], v_BSJV[:, :t], segments_BT, segments_BS[:, :t], scale)
    pad = -k_BSJK.shape[1] % _keys(k_BSJK.shape[1])
    k_BSJK, v_BSJV = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k_BSJK, v_BSJV))
    segments_BS = jnp.pad(segments_BS, ((0, 0), (0, pad)), constant_values=-1)
    return _shifted(q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, jnp.asarray(offset, jnp.int32), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _causal(q_BTHK: Array, k_BTJK: Array, v_BTJV: Array, segments_BT: Array, segments_BS: Array, scale: float) -> Array:
    return _causal_fwd(q_BTHK, k_BTJK, v_BTJV, segments_BT, segments_BS, scale)[0]


class _Group:
    """One KV head of one sequence and the G query heads that it serves, as matrices; rows are (token, query head)."""

    def __init__(self, i: Array, heads: int, kv_heads: int, segments_T: Array, segments_S: Array):
        self.b, self.j = i // kv_heads, i % kv_heads
        self.width = heads // kv_heads
        self.segments_T, self.segments_S = segments_T, segments_S

    def read(self, x: Array, heads: int) -> Array:
        """This group's `heads` heads of x [B, T, all heads, width], as [T * heads, width]."""
        start = (self.b, 0, self.j * heads, 0)
        part = lax.dynamic_slice(to_bits(x), start, (1, x.shape[1], heads, x.shape[3]))
        return from_bits(part.reshape(-1, x.shape[3]))

    def rows(self, start: int, stop: int) -> slice:
        """The rows of tokens `start` to `stop`."""
        return slice(start * self.width, stop * self.width)

    def sees(self, start: int, stop: int, queries: int) -> Array:
        """Whether each query row of tokens `start` to `stop` sees each key before `stop`; `queries`: the queries' axis.

        The mask is built in the orientation of its use. A transposed mask would prevent XLA from vectorising it and the
        softmax that it is fused with.
        """
        shape = [stop, stop]
        shape[queries] = (stop - start) * self.width
        times = start + lax.broadcasted_iota(jnp.int32, shape, queries) // self.width
        slots = lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
        segments = jnp.expand_dims(jnp.repeat(self.segments_T[start:stop], self.width), 1 - queries)
        return (slots <= times) & (jnp.expand_dims(self.segments_S[:stop], queries) == segments)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Query blocks as (start, stop), of 128 tokens or more: at most 16 blocks, which bounds compile time."""
    size = max(128, -(-tokens // 16))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _over_groups(
    body: Callable[..., tuple[Array, ...]],
    vectors: Sequence[tuple[Array, int]],
    groups: int,
    results: Sequence[tuple[tuple[int, ...], Any]],
) -> list[Array]:
    """body(i, *vectors of i) for every group i, stacked: arrays [groups, *shape] for each (shape, dtype) of `results`.

    vectors: (x, n) stands for x[i // n]. Each iteration prefetches those of the next into the loop's state. Without
    that, XLA would fuse the slice into the softmax and repeat it for every element.
    """

    def fetch(i: Array | int) -> tuple[Array, ...]:
        return tuple(lax.dynamic_index_in_dim(x, i // n, 0, keepdims=False) for x, n in vectors)

    def part(start: int, stop: int) -> tuple[Array, ...]:
        def iteration(i: Array, state: tuple) -> tuple:
            stacks, now = state
            new = (to_bits(x.astype(dtype)) for x, (_, dtype) in zip(body(i, *now), results, strict=True))
            stacks = [lax.dynamic_update_index_in_dim(s, x, i - start, 0) for s, x in zip(stacks, new, strict=True)]
            return tuple(stacks), fetch(i + 1)

        empty = tuple(to_bits(jnp.zeros((stop - start, *shape), dtype)) for shape, dtype in results)
        return lax.fori_loop(start, stop, iteration, (empty, fetch(start)))[0]

    parts = [part(start, stop) for start, stop in streams.ranges(groups)]
    return [jnp.concatenate(stacks) for stacks in zip(*parts, strict=True)]


def _ungroup(x_GRK: Array, shape: tuple[int, ...]) -> Array:
    """Rows (token, head) of every group, held as bits, as [B, T, all heads, width]."""
    b, t, heads, width = shape
    return from_bits(x_GRK.reshape(b, -1, t, heads * b // x_GRK.shape[0], width).swapaxes(1, 2).reshape(shape))


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
            scores = jnp.where(group.sees(start, stop, 0), scores, MASKED)
            top = jnp.max(scores, axis=1, keepdims=True)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, axis=1, keepdims=True)
            outs.append(dot(p.astype(dtype), v[:stop]) / total)
            sums.append(top[:, 0] + jnp.log(total[:, 0]))
        return jnp.concatenate(outs), jnp.concatenate(sums)

    rows = t * h // j
    vectors = (segments_BT, j), (segments_BS, j)
    o_GRV, lse_GR = _over_groups(body, vectors, b * j, [((rows, v_BTJV.shape[3]), dtype), ((rows,), jnp.float32)])
    # Named, so that a remat policy can keep them instead of running the forward pass again.
    o_BTHV = _ungroup(o_GRV, (b, t, h, v_BTJV.shape[3]))
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
            # Keys are rows and queries columns: every product below then has row-major operands (see weight_gradient).
            scores = jnp.where(group.sees(start, stop, 1), dot(k[:stop], q[rows], (1, 1)) * scale, MASKED)
            p = jnp.exp(scores - lse[rows])
            ds = (p * (dot(v[:stop], g[rows], (1, 1)) - mean[rows]) * scale).astype(dtype)
            dq.append(dot(kt[:, :stop], ds))
            dk = dk.at[:stop].add(dot(ds, q[rows]))
            dv = dv.at[:stop].add(dot(p.astype(dtype), g[rows]))
        return jnp.concatenate(dq, axis=1).T, dk, dv

    inputs = (q_BTHK, h // j), (k_BTJK, 1), (v_BTJV, 1)
    vectors = (segments_BT, j), (segments_BS, j), (lse_GR, 1)
    stacks = _over_groups(body, vectors, b * j, [((t * heads, x.shape[3]), dtype) for x, heads in inputs])
    return (*(_ungroup(stack, x.shape) for stack, (x, _) in zip(stacks, inputs, strict=True)), None, None)


_causal.defvjp(_causal_fwd, _causal_bwd)


# From here on: queries at an offset that is known only at run time. Keys are read in blocks, too, without the blocks
# after the last query, and the softmax is online.


def _keys(slots: int) -> int:
    """Keys of a block."""
    return min(512, slots)


class _KeyBlocks:
    """The blocks of keys that the query rows of tokens `start` to `stop` of a group may see."""

    def __init__(self, group: _Group, start: int, stop: int, offset: Array, scale: float):
        self._group, self._start, self._stop, self._offset, self._scale = group, start, stop, offset, scale
        self.size = _keys(len(group.segments_S))
        blocks = (offset + stop + self.size - 1) // self.size
        self.count = jnp.minimum(blocks, len(group.segments_S) // self.size)

    def take(self, x: Array, block: Array) -> Array:
        """The block's rows of x."""
        return lax.dynamic_slice_in_dim(x, block * self.size, self.size)

    def scores(self, q: Array, k: Array, block: Array) -> Array:
        """Scaled products of the query rows with the block's keys, masked."""
        width = self._group.width
        times = jnp.repeat(jnp.arange(self._start, self._stop), width)[:, None] + self._offset
        segments = jnp.repeat(self._group.segments_T[self._start : self._stop], width)[:, None]
        slots_S = block * self.size + jnp.arange(self.size)
        sees = (slots_S <= times) & (self.take(self._group.segments_S, block) == segments)
        return jnp.where(sees, dot(q, self.take(k, block), (1, 1)) * self._scale, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _shifted(
    q_BTHK: Array, k_BSJK: Array, v_BSJV: Array, segments_BT: Array, segments_BS: Array, offset: Array, scale: float
) -> Array:
    return _shifted_fwd(q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, scale)[0]


def _shifted_fwd(
    q_BTHK: Array, k_BSJK: Array, v_BSJV: Array, segments_BT: Array, segments_BS: Array, offset: Array, scale: float
) -> tuple[Array, tuple]:
    (b, t, h, _), j, dtype, width = q_BTHK.shape, k_BSJK.shape[2], q_BTHK.dtype, v_BSJV.shape[3]

    def body(i: Array, segments_T: Array, segments_S: Array) -> tuple[Array, Array]:
        group = _Group(i, h, j, segments_T, segments_S)
        q, k, v = group.read(q_BTHK, h // j), group.read(k_BSJK, 1), group.read(v_BSJV, 1)
        outs, sums = [], []
        for start, stop in _blocks(t):
            rows, blocks = q[group.rows(start, stop)], _KeyBlocks(group, start, stop, offset, scale)

            def add(block: Array, carry: tuple, rows: Array = rows, blocks: _KeyBlocks = blocks) -> tuple:
                o, top, total = carry
                scores = blocks.scores(rows, k, block)
                higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
                p, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
                o = o * fade + dot(p.astype(dtype), blocks.take(v, block))
                return o, higher, total * fade + jnp.sum(p, axis=1, keepdims=True)

            zero = jnp.zeros((len(rows), 1), jnp.float32)
            begin = (jnp.zeros((len(rows), width), jnp.float32), zero + 2 * MASKED, zero)
            o, top, total = lax.fori_loop(0, blocks.count, add, begin)
            outs.append(o / total)
            sums.append(top[:, 0] + jnp.log(total[:, 0]))
        return jnp.concatenate(outs), jnp.concatenate(sums)

    rows, vectors = t * h // j, ((segments_BT, j), (segments_BS, j))
    o_GRV, lse_GR = _over_groups(body, vectors, b * j, [((rows, width), dtype), ((rows,), jnp.float32)])
    o_BTHV = _ungroup(o_GRV, (b, t, h, width))
    o_BTHV, lse_GR = checkpoint_name(o_BTHV, "attention"), checkpoint_name(lse_GR, "attention")
    return o_BTHV, (q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, o_BTHV, lse_GR)


def _shifted_bwd(scale: float, kept: tuple, g_BTHV: Array) -> tuple:
    q_BTHK, k_BSJK, v_BSJV, segments_BT, segments_BS, offset, o_BTHV, lse_GR = kept
    (b, t, h, _), (slots, j), dtype = q_BTHK.shape, k_BSJK.shape[1:3], q_BTHK.dtype

    def body(i: Array, segments_T: Array, segments_S: Array, lse: Array) -> tuple[Array, Array, Array]:
        group = _Group(i, h, j, segments_T, segments_S)
        q, o, g = (group.read(x, h // j) for x in (q_BTHK, o_BTHV, g_BTHV))
        k, v = group.read(k_BSJK, 1), group.read(v_BSJV, 1)
        mean = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=1)
        dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, stop in _blocks(t):
            rows, blocks = group.rows(start, stop), _KeyBlocks(group, start, stop, offset, scale)

            def add(block: Array, carry: tuple, rows: slice = rows, blocks: _KeyBlocks = blocks) -> tuple:
                dq, dk, dv = carry
                p = jnp.exp(blocks.scores(q[rows], k, block) - lse[rows, None])
                dp = dot(g[rows], blocks.take(v, block), (1, 1))
                ds = (p * (dp - mean[rows, None]) * scale).astype(dtype)
                parts = weight_gradient(ds, q[rows]), weight_gradient(p.astype(dtype), g[rows])
                dk, dv = (
                    lax.dynamic_update_slice_in_dim(x, blocks.take(x, block) + part, block * blocks.size, 0)
                    for x, part in zip((dk, dv), parts, strict=True)
                )
                return dq + dot(ds, blocks.take(k, block)), dk, dv

            begin = (jnp.zeros(q[rows].shape, jnp.float32), dk, dv)
            part, dk, dv = lax.fori_loop(0, blocks.count, add, begin)
            dq.append(part)
        return jnp.concatenate(dq), dk, dv

    inputs = (q_BTHK, t * h // j), (k_BSJK, slots), (v_BSJV, slots)
    vectors = (segments_BT, j), (segments_BS, j), (lse_GR, 1)
    stacks = _over_groups(body, vectors, b * j, [((rows, x.shape[3]), dtype) for x, rows in inputs])
    grads = (_ungroup(stack, x.shape) for stack, (x, _) in zip(stacks, inputs, strict=True))
    return (*grads, None, None, None)


_shifted.defvjp(_shifted_fwd, _shifted_bwd)
