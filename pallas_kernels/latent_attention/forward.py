"""The forward kernel: attention of a block of queries to a chunk of keys, in a loop over blocks of the chunk.

The chunk stays in VMEM. Scores have the layout [keys, queries]: the statistics of the softmax are then rows, which are
cheap to compute and to broadcast. The values are transposed once per chunk and get rows of ones, so that the MXU also
sums the weights. Letters: B batch, T queries, S keys, H heads, J KV heads, N nope, R rope, V value, P = N + R.
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

from pallas_kernels.common import LANES, MASKED, cost_estimate
from pallas_kernels.latent_attention.inputs import AttentionInputs
from pallas_kernels.latent_attention.visibility import FlashBlocks, Place, Scalars, mask, mask_corner, place, walk

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
ONES = 16  # rows of ones below the values: the height of a bfloat16 register tile
VMEM_LIMIT = 48 * 2**20
WINDOW = 90.0  # powers of two between a score and its reference; float32 and bfloat16 reach 126
FLOOR = MASKED / 2  # start of a running maximum: above masked scores, so that exp makes them 0


def dot(a: Array, b: Array, dimensions: tuple) -> Array:
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, precision=precision(a.dtype))


def precision(dtype: jnp.dtype) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def squared_norms(x: Array) -> Array:
    """[1, rows] of x [rows, width]."""
    return dot(jnp.ones((8, x.shape[1]), x.dtype), x * x, NT)[:1]


def join(nope: Array, rope: Array | None) -> Array:
    return nope if rope is None else jnp.concatenate([nope, rope], axis=1)


class _ForwardRefs(NamedTuple):
    """Inputs, outputs and scratch of a grid step. A float for each query is [1, queries]."""

    scalars: Scalars
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
    v_transposed: Any  # values, [V, keys], and the rows of ones
    max_norm: Any  # squared norm of the chunk's longest key
    sums: Any  # weighted values, [V, queries], with weights 2 ** (score - top)
    total: Any  # sum of these weights
    top: Any
    before: tuple  # sums, total and top of the chunks before this one

    def q(self, rows: slice = slice(None)) -> Array:
        return join(self.q_nope[rows], None if self.q_rope is None else self.q_rope[rows])

    def k(self, rows: slice | pl.Slice = slice(None)) -> Array:
        return join(self.k_nope[rows], None if self.k_rope is None else self.k_rope[rows])


def _kernel(*refs, scale: float, blocks: FlashBlocks, chunks: int):
    """Attention of a block of queries to a chunk of keys. Bounded scores need no running maximum."""
    ref = _ForwardRefs._make([*refs[:16], refs[16:]])
    batch, i, chunk = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    here = place(ref.scalars, batch, i, chunk, (pl.num_programs(2), chunks), blocks)
    scale = scale * math.log2(math.e)

    @pl.when((i == 0) | (chunks > 1))
    def _():
        width, real = ref.v.shape[1], ref.padding[...] > 0
        ref.v_transposed[:width] = jnp.where(real, ref.v[...].T, 0).astype(ref.v_transposed.dtype)
        if blocks.ones:
            ref.v_transposed[width:] = jnp.ones_like(ref.v_transposed[width:])
        norms = jnp.where(real, squared_norms(ref.k()), 0)
        ref.max_norm[...] = jnp.broadcast_to(jnp.max(norms, axis=1, keepdims=True), ref.max_norm.shape)

    # A query's scores are at most its norm times the norm of the longest key.
    bound = 1.01 * scale * jnp.sqrt(squared_norms(ref.q()) * ref.max_norm[:, :1])
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

    # If the bound exceeds the window, the largest score may be so far below the bound that its weight underflows.
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


def _collect(ref: _ForwardRefs, weights: Array, rows: slice | pl.Slice, columns: slice) -> None:
    new, width = dot(ref.v_transposed[:, rows], weights.astype(ref.v_transposed.dtype), NN), ref.v.shape[1]
    ref.sums[:, columns] += new[:width]
    added = new[width : width + 1] if new.shape[0] > width else jnp.sum(weights, axis=0, keepdims=True)
    ref.total[:, columns] += added


def _online(ref: _ForwardRefs, here: Place, blocks: FlashBlocks, scale: float) -> None:
    """Computes the chunk again with the running maximum of the online softmax, which takes scores of any size."""
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


def _merge(ref: _ForwardRefs, chunk: Array, chunks: int) -> None:
    """Adds the sums of the chunks before to this chunk's, and keeps them for the next."""
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


class ForwardPosition(NamedTuple):
    """The grid's position: sequence, head, block of queries, chunk of keys."""

    b: Array
    h: Array
    i: Array
    chunk: Array
    scalars: Scalars


def forward(
    x: AttentionInputs, scalars: Scalars, *, scale: float, blocks: FlashBlocks, interpret: bool
) -> tuple[Array, Array]:
    """(o [B, H, T, V] in q's dtype, log2 of the softmax's sum [B, H, 1, T] float32, huge where a query sees nothing).

    blocks.queries divides T, blocks.chunk S. scalars: of blocks of blocks.queries queries and blocks.part keys.
    """
    (b, h, t, n), (_, _, s, v) = x.q_nope.shape, x.v.shape
    r, chunks = None if x.k_rope is None else x.k_rope.shape[2], s // blocks.chunk
    in_specs, out_specs = _specs(x, blocks)
    row = pltpu.VMEM((1, blocks.queries), jnp.float32)
    state = [pltpu.VMEM((v, blocks.queries), jnp.float32), row, row]
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, blocks=blocks, chunks=chunks),
        name="latent_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, h, t // blocks.queries, chunks),
            in_specs=in_specs,
            out_specs=out_specs,
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
        # Causality leaves half of the scores, and a product takes 2 FLOPs.
        cost_estimate=cost_estimate(b * h * t * s * (n + (r or 0) + v), (x.q_nope, x.q_rope, x.k_nope, x.v)),
        interpret=interpret,
    )(
        scalars,
        *x[:5],
        x.segments_BT[:, None],
        jnp.broadcast_to(x.segments_BS[:, :, None], (b, s, LANES)),
        x.segments_BS[:, None],
    )


def _specs(x: AttentionInputs, blocks: FlashBlocks) -> tuple[list, list]:
    """Blocks of the inputs and of the outputs."""
    (_, h, _, n), (_, j, _, v) = x.q_nope.shape, x.v.shape
    r = None if x.k_rope is None else x.k_rope.shape[2]

    def spec(shape: tuple, index: Callable[[ForwardPosition], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(ForwardPosition(*at)))

    def chunk(at: ForwardPosition) -> Array:
        """The grid's chunk, lowered to the last one that the queries see.

        For the skipped chunks the index then repeats, and Pallas copies nothing.
        """
        return jnp.minimum(at.chunk, (at.scalars.offset[0] + (at.i + 1) * blocks.queries - 1) // blocks.chunk)

    def of_queries(width: int) -> pl.BlockSpec:
        return spec((None, None, blocks.queries, width), lambda at: (at.b, at.h, at.i, 0))

    def of_heads(width: int) -> pl.BlockSpec:
        return spec((None, None, blocks.chunk, width), lambda at: (at.b, at.h // (h // j), chunk(at), 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return spec((None, blocks.chunk, width), lambda at: (at.b, chunk(at), 0))

    inputs = [
        of_queries(n),
        r and of_queries(r),
        of_heads(n),
        r and of_keys(r),
        of_heads(v),
        spec((None, 1, blocks.queries), lambda at: (at.b, 0, at.i)),
        of_keys(LANES),
        spec((None, 1, blocks.chunk), lambda at: (at.b, 0, chunk(at))),
    ]
    lse = spec((None, None, 1, blocks.queries), lambda at: (at.b, at.h, 0, at.i))
    return inputs, [of_queries(v), lse]
