"""The backward kernel: computes the scores once for all gradients.

It recomputes the softmax weights from the logarithm of the softmax's sum, as [keys, queries]. It sums the gradients of
a chunk's keys and values in VMEM over all queries of all heads that share them, so each is written once. Those of the
rope key are summed over all heads. Letters as in forward.py; G query heads per KV head.
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

from pallas_kernels.common import LANES, cost_estimate
from pallas_kernels.latent_attention.forward import NN, NT, VMEM_LIMIT, dot, join
from pallas_kernels.latent_attention.visibility import (
    FlashBlocks,
    Scalars,
    SegmentBounds,
    mask,
    mask_corner,
    place,
    walk,
)


class Operands(NamedTuple):
    """Inputs of the backward pass, with shapes in `backward`."""

    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    g: Any
    lse: Any
    mean: Any
    segments_queries: Any
    segments_keys: Any
    padding: Any


class Gradients(NamedTuple):
    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any


class _BackwardScratch(NamedTuple):
    q: Any  # a block's queries and cotangents, padding set to 0
    g: Any
    k_transposed: Any  # [N + R, keys]
    dq: Any  # [N + R, queries]
    dk: Any  # [keys, N + R]
    dv: Any
    dk_rope: Any


def _kernel(
    scalars: Scalars,
    x: Operands,
    before: Gradients | None,
    grad: Gradients,
    *scratch,
    scale: float,
    blocks: FlashBlocks,
):
    own = _BackwardScratch(*scratch)
    batch, j, group, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    groups, steps, n = pl.num_programs(3), pl.num_programs(4), x.q_nope.shape[1]
    chunks = scalars.keys.low.shape[0] // pl.num_programs(0) // (blocks.chunk // blocks.part)
    here = place(scalars, batch, i, None, (steps, chunks), blocks)

    @pl.when((group == 0) & (i == 0))
    def _():
        real = x.padding[...] > 0
        for ref, rows in ((x.k_nope, slice(0, n)), (x.k_rope, slice(n, None))):
            if ref is not None:
                own.k_transposed[rows] = jnp.where(real, ref[...].T, 0).astype(own.k_transposed.dtype)
        own.dk[...], own.dv[...] = jnp.zeros_like(own.dk), jnp.zeros_like(own.dv)

    _load_queries(x, own, here.queries)
    own.dq[...] = jnp.zeros_like(own.dq)

    def add(at: Array, keys: int, skip: int, masked: bool) -> None:
        rows, columns = pl.ds(at, keys), slice(skip, None)
        p, ds = _scores(x, own, rows, columns, scale)
        if masked:
            sees = mask(x.segments_keys[rows], x.segments_queries[:, columns], here.ahead + skip - at)
            p, ds = jnp.where(sees, p, 0), jnp.where(sees, ds, 0)
        _collect(own, p, ds, rows, columns)

    def triangle(at: Array) -> None:
        for start in range(0, blocks.queries, blocks.part):
            rows, columns = pl.ds(at, start + blocks.part), slice(start, start + blocks.part)
            p, ds = _scores(x, own, rows, columns, scale)
            _collect(own, mask_corner(p), mask_corner(ds), rows, columns)

    walk(here, blocks, add, triangle)

    # Blocks of queries before the first that sees the chunk share that block's dq. It is written once at the start, and
    # again at its own step.
    @pl.when((i == _nearest(i, scalars, blocks, steps)) | (i == 0))
    def _():
        for name, rows in (("q_nope", slice(0, n)), ("q_rope", slice(n, None))):
            ref = getattr(grad, name)
            if ref is not None:
                new = (own.dq[rows] * scale).astype(ref.dtype).T
                ref[...] = new if before is None else getattr(before, name)[...] + new

    @pl.when((group == groups - 1) & (i == steps - 1))
    def _():
        grad.v[...] = own.dv[...].astype(grad.v.dtype)
        grad.k_nope[...] = (own.dk[:, :n] * scale).astype(grad.k_nope.dtype)
        if grad.k_rope is not None:
            rope = own.dk[:, n:] * scale
            own.dk_rope[...] = jnp.where(j == 0, rope, own.dk_rope[...] + rope)
            grad.k_rope[...] = own.dk_rope[...]


def _load_queries(x: Operands, own: _BackwardScratch, queries: SegmentBounds) -> None:
    """Copies queries and cotangents, with 0 for padding, which may be NaN and must not reach a real key."""

    @pl.when(queries.only > 0)
    def _():
        own.q[...], own.g[...] = join(x.q_nope[...], None if x.q_rope is None else x.q_rope[...]), x.g[...]

    @pl.when(queries.only <= 0)
    def _():
        segments = jnp.broadcast_to(x.segments_queries[...], (LANES, x.segments_queries.shape[1])).T
        real = segments[:, :1] > 0
        own.q[...] = jnp.where(real, join(x.q_nope[...], None if x.q_rope is None else x.q_rope[...]), 0)
        own.g[...] = jnp.where(real, x.g[...], 0)


def _scores(
    x: Operands, own: _BackwardScratch, rows: slice | pl.Slice, columns: slice, scale: float
) -> tuple[Array, Array]:
    """(softmax weights, gradients of the unscaled scores), each [keys, queries]."""
    k = join(x.k_nope[rows], None if x.k_rope is None else x.k_rope[rows])
    p = jnp.exp2(dot(k, own.q[columns], NT) * (scale * math.log2(math.e)) - x.lse[:, columns])
    return p, p * (dot(x.v[rows], own.g[columns], NT) - x.mean[:, columns])


def _collect(own: _BackwardScratch, p: Array, ds: Array, rows: slice | pl.Slice, columns: slice) -> None:
    p, ds = p.astype(own.g.dtype), ds.astype(own.g.dtype)
    own.dv[rows] += dot(p, own.g[columns], NN)
    own.dk[rows] += dot(ds, own.q[columns], NN)
    own.dq[:, columns] += dot(own.k_transposed[:, rows], ds, NN)


def _nearest(i: Array, scalars: Scalars, blocks: FlashBlocks, steps: int | Array) -> Array:
    """i, raised to the first block of queries that sees the chunk.

    For the skipped blocks the index then repeats, and Pallas copies nothing.
    """
    chunk, offset = scalars.chunk[0], scalars.offset[0]
    unseeing = jnp.maximum(chunk * blocks.chunk - offset, 0) // blocks.queries
    return jnp.minimum(jnp.maximum(i, unseeing), steps - 1)


def backward(
    x: Operands, scalars: Scalars, *, scale: float, blocks: FlashBlocks, parts: int, interpret: bool
) -> Gradients:
    """Gradients of queries, keys and values, in their dtypes.

    x: q_nope [B, H, T, N], q_rope [B, H, T, R], k_nope [B, J, S, N], k_rope [B, S, R], v [B, J, S, V], g [B, H, T, V],
    lse and mean (the sum of g o over V) [B, H, 1, T] float32, segments_queries [B, 1, T], segments_keys [B, S, LANES],
    padding [B, 1, S]. scalars: as for `forward`. parts: the number of partial sums of the rope key's gradient, one
    per core; divides J.
    """
    sweep = functools.partial(_sweep, x, scalars, scale=scale, blocks=blocks, parts=parts, interpret=interpret)
    chunks = x.v.shape[2] // blocks.chunk
    if chunks == 1:
        grad = sweep(jnp.int32(0), None)
    else:
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), _shapes(x, parts, chunks))
        grad = lax.fori_loop(0, chunks, sweep, zeros)
    if grad.k_rope is not None:
        grad = grad._replace(k_rope=jnp.sum(grad.k_rope, axis=0))
    return jax.tree.map(lambda new, old: new.astype(old.dtype), grad, Gradients(*x[:5]))


def _shapes(x: Operands, parts: int, chunks: int) -> Gradients:
    """Shapes of one call's gradients: float32 where other calls or parts add to them."""
    summed = x.q_nope.dtype if chunks == 1 else jnp.float32
    rope = x.q_rope is not None
    return Gradients(
        q_nope=jax.ShapeDtypeStruct(x.q_nope.shape, summed),
        q_rope=jax.ShapeDtypeStruct(x.q_rope.shape, summed) if rope else None,
        k_nope=jax.ShapeDtypeStruct(x.k_nope.shape, x.k_nope.dtype),
        k_rope=jax.ShapeDtypeStruct((parts, *x.k_rope.shape), jnp.float32) if rope else None,
        v=jax.ShapeDtypeStruct(x.v.shape, x.v.dtype),
    )


def _sweep(
    x: Operands,
    scalars: Scalars,
    chunk: Array,
    before: Gradients | None,
    *,
    scale: float,
    blocks: FlashBlocks,
    parts: int,
    interpret: bool,
) -> Gradients:
    """`before` with the gradients of one chunk of keys written, and with its part of the queries' gradients added."""
    (b, h, t, n), (_, j, s, v) = x.q_nope.shape, x.v.shape
    r = None if x.q_rope is None else x.q_rope.shape[3]
    steps, shared, width = t // blocks.queries, j // parts, n + (r or 0)
    specs, grad_specs = _specs((n, r, v), (h // j, shared, steps), blocks)
    grads = _shapes(x, parts, s // blocks.chunk)
    args = (scalars._replace(chunk=chunk.reshape(1)), x)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, blocks=blocks),
        name="latent_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, parts, shared, h // j, steps),
            in_specs=[specs, before and _unread_keys(grad_specs)],
            out_specs=(grad_specs,),
            scratch_shapes=[
                pltpu.VMEM((blocks.queries, width), x.g.dtype),
                pltpu.VMEM((blocks.queries, v), x.g.dtype),
                pltpu.VMEM((width, blocks.chunk), x.g.dtype),
                pltpu.VMEM((width, blocks.queries), jnp.float32),
                pltpu.VMEM((blocks.chunk, width), jnp.float32),
                pltpu.VMEM((blocks.chunk, v), jnp.float32),
                pltpu.VMEM((blocks.chunk, r) if r else (8, LANES), jnp.float32),
            ],
        ),
        out_shape=(grads,),
        input_output_aliases={len(jax.tree.leaves(args)) + n: n for n in range(len(jax.tree.leaves(before)))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=cost_estimate(b * h * t * blocks.chunk * (3 * width + 2 * v), (x, grads)),
        interpret=interpret,
    )(*args, before)[0]


def _unread_keys(specs: Gradients) -> Gradients:
    """Specs of the gradients so far: the kernel reads those of queries and leaves those of keys and values in HBM."""
    there = pl.BlockSpec(memory_space=pl.ANY)
    return specs._replace(k_nope=there, k_rope=specs.k_rope and there, v=there)


class BackwardPosition(NamedTuple):
    """The grid's position: sequence, part, KV head of the part, query head of the KV head, block of queries."""

    b: Array
    part: Array
    j: Array
    group: Array
    i: Array
    scalars: Scalars


def _specs(widths: tuple, counts: tuple, blocks: FlashBlocks) -> tuple[Operands, Gradients]:
    """Blocks of operands and gradients. counts: query heads of a KV head, KV heads of a part, blocks of queries."""
    (n, r, v), (groups, shared, steps) = widths, counts

    def spec(shape: tuple, index: Callable[[BackwardPosition], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *at: index(BackwardPosition(*at[:6])))

    def head(at: BackwardPosition) -> Array:
        return (at.part * shared + at.j) * groups + at.group

    def i(at: BackwardPosition) -> Array:
        return _nearest(at.i, at.scalars, blocks, steps)

    def of_queries(width: int) -> pl.BlockSpec:
        return spec((None, None, blocks.queries, width), lambda at: (at.b, head(at), i(at), 0))

    def of_heads(width: int) -> pl.BlockSpec:
        shape = (None, None, blocks.chunk, width)
        return spec(shape, lambda at: (at.b, at.part * shared + at.j, at.scalars.chunk[0], 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return spec((None, blocks.chunk, width), lambda at: (at.b, at.scalars.chunk[0], 0))

    row = spec((None, None, 1, blocks.queries), lambda at: (at.b, head(at), 0, i(at)))
    operands = Operands(
        q_nope=of_queries(n),
        q_rope=r and of_queries(r),
        k_nope=of_heads(n),
        k_rope=r and of_keys(r),
        v=of_heads(v),
        g=of_queries(v),
        lse=row,
        mean=row,
        segments_queries=spec((None, 1, blocks.queries), lambda at: (at.b, 0, i(at))),
        segments_keys=of_keys(LANES),
        padding=spec((None, 1, blocks.chunk), lambda at: (at.b, 0, at.scalars.chunk[0])),
    )
    gradients = Gradients(
        q_nope=operands.q_nope,
        q_rope=operands.q_rope,
        k_nope=operands.k_nope,
        k_rope=r and spec((None, None, blocks.chunk, r), lambda at: (at.part, at.b, at.scalars.chunk[0], 0)),
        v=operands.v,
    )
    return operands, gradients
