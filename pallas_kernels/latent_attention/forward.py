"""The forward kernel: a block of queries against a chunk of keys that stays in VMEM, an inner loop over its blocks.

Scores are held as [keys, queries]: the statistics of the softmax are then rows, cheap to make and to spread, and the
values, turned once per chunk, carry a row of ones that adds up the weights on the MXU. Letters: B batch, T queries,
S keys, H heads, J KV heads, N nope, R rope, V value, P = N + R.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.constants import LANES, MASKED
from pallas_kernels.latent_attention.inputs import AttentionInputs
from pallas_kernels.latent_attention.visibility import (
    Blocks,
    Bounds,
    Place,
    mask,
    mask_corner,
    place,
    walk,
    work,
)

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
ONES = 16  # rows of ones below the values: a bfloat16 tile's worth
VMEM_LIMIT = 48 * 2**20
WINDOW = 90.0  # in powers of two: how far a score may lie from its reference; float32 and bfloat16 reach 126
FLOOR = MASKED / 2  # where a running maximum starts: above what is masked, so that exp gives it 0


def dot(a: Array, b: Array, dimensions: tuple) -> Array:
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, precision=precision(a.dtype))


def precision(dtype: jnp.dtype) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def squared_norms(x: Array) -> Array:
    """[1, rows] of x [rows, width]."""
    return dot(jnp.ones((8, x.shape[1]), x.dtype), x * x, NT)[:1]


def join(nope: Array, rope: Array | None) -> Array:
    return nope if rope is None else jnp.concatenate([nope, rope], axis=1)


class _Refs(NamedTuple):
    """What a grid step reads, writes and keeps. Rows of one float a query are [1, queries]."""

    offset: Any
    queries: Bounds
    keys: Bounds
    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    segments_queries: Any
    segments_keys: Any
    padding: Any  # the keys' segments again, as a row
    o: Any
    lse: Any
    turned: Any  # values, [V, keys], and the rows of ones
    largest: Any  # squared norm of the chunk's longest key
    sums: Any  # weighted values, [V, queries], of weights 2 ** (score - top)
    total: Any  # sum of these weights
    top: Any
    before: tuple  # sums, total and top of the chunks before this one

    def q(self, rows: slice = slice(None)) -> Array:
        return join(self.q_nope[rows], None if self.q_rope is None else self.q_rope[rows])

    def k(self, rows: slice | pl.Slice = slice(None)) -> Array:
        return join(self.k_nope[rows], None if self.k_rope is None else self.k_rope[rows])


def _kernel(*refs, scale: float, blocks: Blocks, chunks: int):
    """Weighs a chunk's keys for a block of queries; no running maximum is needed as long as scores are bounded."""
    ref = _Refs._make([*refs[:18], refs[18:]])
    batch, i, chunk = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    here = place(ref.offset[0], batch, i, chunk, (pl.num_programs(2), chunks), ref.queries, ref.keys, blocks)
    scale = scale * math.log2(math.e)

    @pl.when((i == 0) | (chunks > 1))
    def _():
        width, real = ref.v.shape[1], ref.padding[...] > 0
        ref.turned[:width] = jnp.where(real, ref.v[...].T, 0).astype(ref.turned.dtype)
        if blocks.ones:
            ref.turned[width:] = jnp.ones_like(ref.turned[width:])
        norms = jnp.where(real, squared_norms(ref.k()), 0)
        ref.largest[...] = jnp.broadcast_to(jnp.max(norms, axis=1, keepdims=True), ref.largest.shape)

    # No score of a query exceeds the product of its norm with the largest of a key.
    bound = 1.01 * scale * jnp.sqrt(squared_norms(ref.q()) * ref.largest[:, :1])
    ref.sums[...], ref.total[...] = jnp.zeros_like(ref.sums), jnp.zeros_like(ref.total)
    ref.top[...] = jnp.maximum(bound - WINDOW, 0)

    def add(at: Array, keys: int, skip: int, masked: bool) -> None:
        rows, columns = pl.ds(at, keys), slice(skip, None)
        weights = jnp.exp2(dot(ref.k(rows), ref.q(columns), NT) * scale - ref.top[:, columns])
        if masked:
            sees = mask(ref.segments_keys[rows], ref.segments_queries[:, columns], here.ahead + skip - at)
            weights = jnp.where(sees, weights, 0)
        _collect(ref, weights, rows, columns)

    def triangle(at: Array) -> None:
        for start in range(0, blocks.queries, blocks.part):
            rows, columns = pl.ds(at, start + blocks.part), slice(start, start + blocks.part)
            weights = jnp.exp2(dot(ref.k(rows), ref.q(columns), NT) * scale - ref.top[:, columns])
            _collect(ref, mask_corner(weights), rows, columns)

    walk(here, blocks, add, triangle)

    # With a bound beyond the window the largest score may lie so far below it that its weight was lost.
    lost = (bound > WINDOW) & (ref.total[...] < 2.0**-WINDOW) & (ref.segments_queries[...] > 0)
    pl.when(jnp.any(lost))(lambda: _online(ref, here, blocks, scale))
    if chunks > 1:
        _merge(ref, chunk, chunks)

    @pl.when(chunk == chunks - 1)
    def _():
        total = ref.total[...]
        some = total > 0
        ref.o[...] = (ref.sums[...] * jnp.where(some, 1 / total, 0)).astype(ref.o.dtype).T
        ref.lse[...] = jnp.where(some, ref.top[...] + jnp.log2(total), -MASKED)


def _collect(ref: _Refs, weights: Array, rows: slice | pl.Slice, columns: slice) -> None:
    new, width = dot(ref.turned[:, rows], weights.astype(ref.turned.dtype), NN), ref.v.shape[1]
    ref.sums[:, columns] += new[:width]
    added = new[width : width + 1] if new.shape[0] > width else jnp.sum(weights, axis=0, keepdims=True)
    ref.total[:, columns] += added


def _online(ref: _Refs, here: Place, blocks: Blocks, scale: float) -> None:
    """The chunk again, with the running maximum of the online softmax: for scores of any size."""
    ref.sums[...], ref.total[...] = jnp.zeros_like(ref.sums), jnp.zeros_like(ref.total)
    ref.top[...] = jnp.full_like(ref.top, FLOOR)

    def step(part: Array, _: None) -> None:
        at = pl.multiple_of(part * blocks.part, blocks.part)
        rows = pl.ds(at, blocks.part)
        sees = mask(ref.segments_keys[rows], ref.segments_queries[...], here.ahead - at)
        scores = jnp.where(sees, dot(ref.k(rows), ref.q(), NT) * scale, MASKED)
        top = jnp.maximum(ref.top[...], jnp.max(scores, axis=0, keepdims=True))
        keep = jnp.exp2(ref.top[...] - top)
        ref.sums[...], ref.total[...], ref.top[...] = ref.sums[...] * keep, ref.total[...] * keep, top
        _collect(ref, jnp.exp2(scores - top), rows, slice(None))

    lax.fori_loop(0, here.visible * (blocks.keys // blocks.part), step, None)


def _merge(ref: _Refs, chunk: Array, chunks: int) -> None:
    """Joins this chunk's sums with those before it, and keeps them for the next."""
    ref.top[...] = jnp.where(ref.total[...] > 0, ref.top[...], FLOOR)
    sums, total, top = ref.before

    @pl.when(chunk > 0)
    def _():
        both = jnp.maximum(top[...], ref.top[...])
        old, new = jnp.exp2(top[...] - both), jnp.exp2(ref.top[...] - both)
        ref.sums[...] = sums[...] * old + ref.sums[...] * new
        ref.total[...] = total[...] * old + ref.total[...] * new
        ref.top[...] = both

    @pl.when(chunk < chunks - 1)
    def _():
        sums[...], total[...], top[...] = ref.sums[...], ref.total[...], ref.top[...]


class _At(NamedTuple):
    """Where the grid is: sequence, head, block of queries, chunk of keys."""

    b: Array
    h: Array
    i: Array
    chunk: Array
    offset: Any


def forward(
    x: AttentionInputs,
    queries: Bounds,
    keys: Bounds,
    *,
    scale: float,
    blocks: Blocks,
    interpret: bool,
) -> tuple[Array, Array]:
    """(o [B, H, T, V] in q's dtype, log2 of the softmax's sum [B, H, 1, T] float32, huge where nothing is seen).

    blocks.queries divides T, blocks.chunk S; bounds are those of these blocks of queries and of blocks.keys.
    """
    (b, h, t, n), (_, j, s, v) = x.q_nope.shape, x.v.shape
    r, chunks = None if x.k_rope is None else x.k_rope.shape[2], s // blocks.chunk

    def spec(shape: tuple, index: Callable[[_At], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(_At(*at[:5])))

    def chunk(at: _At) -> Array:
        """The grid's chunk, or the last that the queries see: one beyond is the same again, which moves nothing."""
        return jnp.minimum(at.chunk, (at.offset[0] + (at.i + 1) * blocks.queries - 1) // blocks.chunk)

    def of_queries(width: int) -> pl.BlockSpec:
        return spec((None, None, blocks.queries, width), lambda at: (at.b, at.h, at.i, 0))

    def of_heads(width: int) -> pl.BlockSpec:
        return spec((None, None, blocks.chunk, width), lambda at: (at.b, at.h // (h // j), chunk(at), 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return spec((None, blocks.chunk, width), lambda at: (at.b, chunk(at), 0))

    row = pltpu.VMEM((1, blocks.queries), jnp.float32)
    state = [pltpu.VMEM((v, blocks.queries), jnp.float32), row, row]
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, blocks=blocks, chunks=chunks),
        name="latent_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, h, t // blocks.queries, chunks),
            in_specs=[
                of_queries(n),
                r and of_queries(r),
                of_heads(n),
                r and of_keys(r),
                of_heads(v),
                spec((None, 1, blocks.queries), lambda at: (at.b, 0, at.i)),
                of_keys(LANES),
                spec((None, 1, blocks.chunk), lambda at: (at.b, 0, chunk(at))),
            ],
            out_specs=[
                of_queries(v),
                spec((None, None, 1, blocks.queries), lambda at: (at.b, at.h, 0, at.i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((v + ONES * blocks.ones, blocks.chunk), x.v.dtype),
                pltpu.VMEM((1, LANES), jnp.float32),
                *(state * (2 if chunks > 1 else 1)),
            ],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((b, h, t, v), x.q_nope.dtype),
            jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=work(b * h * t * s * (n + (r or 0) + v), (x.q_nope, x.q_rope, x.k_nope, x.v)),
        interpret=interpret,
    )(
        x.offset.reshape(1),
        queries,
        keys,
        *x[:5],
        x.segments_BT[:, None],
        jnp.broadcast_to(x.segments_BS[:, :, None], (b, s, LANES)),
        x.segments_BS[:, None],
    )
