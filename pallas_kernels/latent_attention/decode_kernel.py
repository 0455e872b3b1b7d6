"""The kernel of decode.py.

It computes a list of (job, chunk) pairs. A job is one token, or a block of consecutive tokens of one sequence. A chunk
is a run of cache slots. Several lists, the streams, advance together, so that the matrix unit works on one while the
softmax of another is computed. Meanwhile the pages of the next chunk are copied, also those of the next job. Quantized
pages are copied as they are stored, and converted to integers in the queries' dtype in VMEM. The scales, one for each
slot, multiply the scores and the weights.

Letters as in pages.py and decode_jobs.py; T query tokens of all sequences, H heads, M = tokens H rows of a job.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import LANES, MASKED, Ref
from pallas_kernels.latent_attention import packing
from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks, DecodeGrid, Jobs, check_scalars, make_jobs
from pallas_kernels.latent_attention.pages import CachePages, Sequences

_VMEM = 56 * 2**20  # bytes; the smallest VMEM has 64 MiB
_LOG2_E = 1.4426950408889634


class _Hbm(NamedTuple):
    q_THC: Ref
    q_THR: Ref
    latent_LKC: Ref
    rope_LRK: Ref
    scales_L1K: Ref  # or None


class _Vmem(NamedTuple):
    """Scratch, S first. The dimension of 2 is a double buffer: by job for queries and results, by step for pages."""

    q_c: Ref  # [S, 2, tokens, H, C]
    q_r: Ref  # [S, 2, tokens, H, R]
    latent: Ref  # [S, 2, pages, K, C], as stored
    rope: Ref  # [S, 2, pages, R, K], as stored
    scales: Ref  # [S, 2, pages, 1, K], or None
    integers: Ref  # [S, 4, pages * K, C / 4], or None: quantized latents in the queries' dtype, in quarters
    out: Ref  # [S, 2, tokens, H, C]
    top: Ref  # [S, M, 128] float32: each row's maximal score so far, in every column
    total: Ref  # [S, M, 128] float32: the softmax's sum, split over the columns
    sum: Ref  # [S, M, C] float32
    q_arrived: Ref  # DMA semaphores [S, 2]
    pages_arrived: Ref
    out_left: Ref


def decode(
    queries: tuple[Array, Array],
    pages: CachePages,
    sequences: Sequences,
    *,
    scale: float,
    blocks: DecodeBlocks,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """As `latent_decode`, which documents the errors. The jobs are spread over `cores` cores."""
    (q_THC, q_THR), (latent_LKC, rope_LRK, scales_L1K) = queries, pages
    t, k = q_THC.shape[0], latent_LKC.shape[1]
    check_scalars(sequences.table_NP, t)
    if k % LANES:
        raise ValueError(f"pages of {k} slots: the kernel needs a multiple of {LANES}")
    if scales_L1K is not None and (q_THC.shape[2] % 4 or q_THR.shape[2] % 16):
        raise ValueError(
            f"a quantized cache with latents of {q_THC.shape[2]} and rope keys of {q_THR.shape[2]}: the kernel needs "
            "multiples of 4 and 16"
        )
    hbm = _Hbm(q_THC, q_THR, latent_LKC, rope_LRK, scales_L1K)
    grids = [DecodeGrid(blocks.pages, blocks.streams, 1, cores)]
    if sequences.starts_N1 is not None:
        # A prefill job has enough rows to keep the matrix unit busy: half the pages and one stream are less code.
        grids.append(DecodeGrid(max(1, blocks.pages // 2), 1, blocks.tokens, cores))
    sequences, o_THC = sequences._replace(starts_N1=sequences.each_start()), None
    for grid in grids:
        jobs = make_jobs(sequences, t, grid.pages * k, grid)
        o_THC = _call(jobs, hbm, sequences.table_NP, o_THC, grid, scale, interpret)
    assert o_THC is not None
    return o_THC


def _call(
    jobs: Jobs,
    arrays: _Hbm,
    table_NP: Array,
    o_THC: Array | None,
    grid: DecodeGrid,
    scale: float,
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    """Runs the jobs. Tokens without a job keep their rows of o_THC; without o_THC their rows are undefined."""
    tokens = grid.tokens
    _, h, c = arrays.q_THC.shape
    r, s, dtype, stored = arrays.q_THR.shape[2], grid.streams, arrays.q_THC.dtype, arrays.latent_LKC.dtype
    k, packed, page = arrays.latent_LKC.shape[1], arrays.scales_L1K is not None, (s, 2, grid.pages)
    scratch = _Vmem(
        q_c=pltpu.VMEM((s, 2, tokens, h, c), dtype),
        q_r=pltpu.VMEM((s, 2, tokens, h, r), dtype),
        latent=pltpu.VMEM((*page, *arrays.latent_LKC.shape[1:]), stored),
        rope=pltpu.VMEM((*page, *arrays.rope_LRK.shape[1:]), stored),
        scales=pltpu.VMEM((*page, 1, k), jnp.uint32) if packed else None,
        integers=pltpu.VMEM((s, 4, grid.pages * k, c // 4), dtype) if packed else None,
        out=pltpu.VMEM((s, 2, tokens, h, c), dtype),
        top=pltpu.VMEM((s, tokens * h, 128), jnp.float32),
        total=pltpu.VMEM((s, tokens * h, 128), jnp.float32),
        sum=pltpu.VMEM((s, tokens * h, c), jnp.float32),
        q_arrived=pltpu.SemaphoreType.DMA((s, 2)),
        pages_arrived=pltpu.SemaphoreType.DMA((s, 2)),
        out_left=pltpu.SemaphoreType.DMA((s, 2)),
    )
    kept = () if o_THC is None else (o_THC,)
    scalars = (*jobs, table_NP.reshape(-1))
    return pl.pallas_call(
        functools.partial(_kernel, pages_of_sequence=table_NP.shape[1], scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(grid.cores,),
            in_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), (*arrays, *kept)),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(arrays.q_THC.shape, arrays.q_THC.dtype),
        input_output_aliases={len(scalars) + len(jax.tree.leaves(arrays)): 0} if kept else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="latent_decode" if tokens == 1 else "latent_decode_blocks",
    )(*scalars, *arrays, *kept)


def _kernel(*refs: Ref, pages_of_sequence: int, scale: float) -> None:
    jobs, table = Jobs(*refs[:6]), refs[6]
    hbm, o_THC, vmem = _Hbm(*refs[7:12]), refs[-len(_Vmem._fields) - 1], _Vmem(*refs[-len(_Vmem._fields) :])
    count = vmem.sum.shape[0]
    streams = [
        _Stream(
            pl.program_id(0) * count + s,
            jobs,
            table,
            pages_of_sequence,
            hbm,
            o_THC,
            jax.tree.map(lambda x, s=s: x.at[s], vmem),
        )
        for s in range(count)
    ]
    for stream in streams:
        stream.reset()
        pl.when(stream.first < stream.end)(functools.partial(stream.fetch, stream.first, jnp.int32(0), jnp.int32(0)))

    def step(i: Array, now: tuple[tuple[Array, Array], ...]) -> tuple[tuple[Array, Array], ...]:
        then = tuple(stream.after(*at) for stream, at in zip(streams, now, strict=True))
        for stream, at in zip(streams, then, strict=True):
            pl.when(at[0] < stream.end)(functools.partial(stream.fetch, *at, (i + 1) % 2))
        for stream, at in zip(streams, now, strict=True):
            pl.when(at[0] < stream.end)(functools.partial(stream.await_pages, *at, i % 2))
        # A stream that has run out of jobs keeps computing without effect, because branches to skip it would cost the
        # other streams more.
        plain = functools.reduce(
            jnp.logical_and, (stream.sees_all(*at) for stream, at in zip(streams, now, strict=True))
        )
        for mask in (False, True):

            @pl.when(plain != mask)
            def _(mask: bool = mask) -> None:
                for stream, at in zip(streams, now, strict=True):
                    stream.attend(*at, i % 2, scale, mask)

        for stream, at, following in zip(streams, now, then, strict=True):
            pl.when((at[0] < stream.end) & (following[0] > at[0]))(functools.partial(stream.finish, at[0]))
        return then

    steps = functools.reduce(jnp.maximum, (stream.steps for stream in streams))
    lax.fori_loop(0, steps, step, tuple((stream.first, jnp.int32(0)) for stream in streams))
    for stream in streams:
        for back in (2, 1):
            job = stream.end - back
            pl.when(job >= stream.first)(functools.partial(stream.await_out, job))


class _Stream:
    """One list of jobs and its scratch, with the shapes of _Vmem without S."""

    def __init__(self, s: Array, jobs: Jobs, table: Ref, pages_of_sequence: int, hbm: _Hbm, o_THC: Ref, vmem: _Vmem):
        self.jobs, self.table, self.pages_of_sequence = jobs, table, pages_of_sequence
        self.hbm, self.o_THC, self.vmem = hbm, o_THC, vmem
        self.first, self.end, self.steps = jobs.bounds_S1[s], jobs.bounds_S1[s + 1], jobs.steps_S[s]
        self.pages, self.k = vmem.latent.shape[1:3]
        self.slots = self.pages * self.k

    def after(self, job: Array, chunk: Array) -> tuple[Array, Array]:
        """The next (job, chunk)."""
        last = (chunk + 1) * self.slots >= self.jobs.visible_J[job]
        return jnp.where(last, job + 1, job), jnp.where(last, 0, chunk + 1)

    def fetch(self, job: Array, chunk: Array, half: Array) -> None:
        """Starts the copies of a chunk's pages, and of a job's queries with its first chunk."""
        at = self.jobs.sequence_J[job] * self.pages_of_sequence + chunk * self.pages

        def start(p: int | Array, _: None = None) -> None:
            for copy in self._copies(self.table[at + p], p, half):
                copy.start()

        filled = self._filled_pages(job, chunk)

        @pl.when(filled == self.pages)
        def _() -> None:
            for p in range(self.pages):
                start(p)

        pl.when(filled < self.pages)(lambda: lax.fori_loop(0, filled, start, None))

        @pl.when(chunk == 0)
        def _() -> None:
            self._each_query(job, lambda copy: copy.start())

    def await_pages(self, job: Array, chunk: Array, half: Array) -> None:
        """Waits for the copies that `fetch` started. Sets latents of unwritten slots to 0, because they may be NaN."""
        v = self.vmem
        filled = self._filled_pages(job, chunk)

        @pl.when(filled == self.pages)
        def _() -> None:  # a wait counts bytes, so one serves all pages
            for _, buffer in self._buffers():
                pltpu.make_async_copy(buffer.at[half], buffer.at[half], v.pages_arrived.at[half]).wait()

        @pl.when(filled < self.pages)
        def _() -> None:
            def wait(p: Array, _: None) -> None:
                for copy in self._copies(0, p, half):
                    copy.wait()

            lax.fori_loop(0, filled, wait, None)

        @pl.when(chunk == 0)
        def _() -> None:
            self._each_query(job, lambda copy: copy.wait())

        if v.scales is not None:
            return
        slots = self.jobs.visible_J[job] - chunk * self.slots

        @pl.when(slots < self.slots)
        def _() -> None:  # a weight of 0 does not remove a NaN
            for p in range(self.pages):
                rows = lax.broadcasted_iota(jnp.int32, (self.k, 1), 0) + p * self.k
                v.latent[half, p] = jnp.where(rows < slots, v.latent[half, p], jnp.zeros((), v.latent.dtype))

    def _filled_pages(self, job: Array, chunk: Array) -> Array:
        return jnp.minimum(pl.cdiv(self.jobs.visible_J[job] - chunk * self.slots, self.k), self.pages)

    def _copies(self, number: int | Array, p: int | Array, half: Array) -> list[Any]:
        """The copies of a page of the cache to page p of a chunk."""
        arrived = self.vmem.pages_arrived.at[half]
        return [
            pltpu.make_async_copy(cache.at[number], buffer.at[half, p], arrived) for cache, buffer in self._buffers()
        ]

    def _buffers(self) -> list[tuple[Ref, Ref]]:
        """The arrays of the cache with the buffers of their pages."""
        buffers = [(self.hbm.latent_LKC, self.vmem.latent), (self.hbm.rope_LRK, self.vmem.rope)]
        return buffers if self.hbm.scales_L1K is None else [*buffers, (self.hbm.scales_L1K, self.vmem.scales)]

    def _each_query(self, job: Array, do: Callable[[Any], None]) -> None:
        half, first = job % 2, self.jobs.first_J[job]
        arrived = self.vmem.q_arrived.at[half]

        def token(t: Array, _: None) -> None:
            do(pltpu.make_async_copy(self.hbm.q_THC.at[first + t], self.vmem.q_c.at[half, t], arrived))
            do(pltpu.make_async_copy(self.hbm.q_THR.at[first + t], self.vmem.q_r.at[half, t], arrived))

        lax.fori_loop(0, self.jobs.count_J[job], token, None)

    def _each_result(self, job: Array, do: Callable[[Any], None]) -> None:
        half, first = job % 2, self.jobs.first_J[job]
        left = self.vmem.out_left.at[half]

        def token(t: Array, _: None) -> None:
            do(pltpu.make_async_copy(self.vmem.out.at[half, t], self.o_THC.at[first + t], left))

        lax.fori_loop(0, self.jobs.count_J[job], token, None)

    def sees_all(self, job: Array, chunk: Array) -> Array:
        """Whether the job's first token, and so each of its tokens, sees all slots of a chunk."""
        return self.jobs.visible_J[job] - (self.jobs.count_J[job] - 1) >= (chunk + 1) * self.slots

    def attend(self, job: Array, chunk: Array, half: Array, scale: float, mask: bool) -> None:
        """Adds a chunk to the running softmax of the job's rows."""
        v = self.vmem
        tokens, h, c = v.q_c.shape[1:]
        q_MC, q_MR = v.q_c[job % 2].reshape(tokens * h, c), v.q_r[job % 2].reshape(tokens * h, -1)
        scores = self._scores if v.integers is None else self._scores_of_integers
        scores_MS, latent_SC, scale_1S = scores(q_MC, q_MR, half)
        if mask:
            token_M1 = lax.broadcasted_iota(jnp.int32, (tokens * h, 1), 0) // h
            visible = self.jobs.visible_J[job] - chunk * self.slots
            slot_1S = lax.broadcasted_iota(jnp.int32, (1, self.slots), 1)
            seen_MS = slot_1S < visible - (self.jobs.count_J[job] - 1 - token_M1)
            scores_MS = jnp.where(seen_MS, scores_MS, MASKED)
            if scale_1S is not None:  # rows of padding see no slot, so all slots have the same weight
                scale_1S = jnp.where(slot_1S < visible, scale_1S, 0.0)

        top_ML = v.top[...]
        new_ML = jnp.maximum(top_ML, jnp.max(scores_MS, axis=1, keepdims=True))
        p_MS = jnp.exp2((scores_MS - new_ML[:, :1]) * (scale * _LOG2_E))
        shrink_ML = jnp.exp2((top_ML - new_ML) * (scale * _LOG2_E))
        shares_ML = functools.reduce(jnp.add, jnp.split(p_MS, self.slots // LANES, axis=1))
        v.top[...] = new_ML
        v.total[...] = v.total[...] * shrink_ML + shares_ML
        weights_MS = p_MS if scale_1S is None else p_MS * scale_1S
        v.sum[...] = v.sum[...] * shrink_ML[:, :1] + _dot(weights_MS.astype(latent_SC.dtype), latent_SC, (1, 0))

    def _scores(self, q_MC: Array, q_MR: Array, half: Array) -> tuple[Array, Array, None]:
        """A chunk's scores and latents, which have no scales."""
        v = self.vmem
        latent_SC = v.latent[half].reshape(self.slots, -1)
        rope_RS = jnp.concatenate([v.rope[half, p] for p in range(self.pages)], axis=1)
        scores_MS = _dot(q_MC, latent_SC, (1, 1))
        scores_MS += _dot(q_MR, rope_RS, (1, 0))
        return scores_MS, latent_SC, None

    def _scores_of_integers(self, q_MC: Array, q_MR: Array, half: Array) -> tuple[Array, Array, Array]:
        """The same for a quantized cache: the latents are integers with a scale for each slot."""
        v = self.vmem
        scores, scales = [], []
        for p in range(self.pages):
            c_1K, r_1K = packing.scales(v.scales[half, p], v.latent.dtype)
            here = slice(p * self.k, (p + 1) * self.k)
            # Through memory, because a conversion leaves rows in registers in an order that the matrix unit cannot use.
            for i, quarter in enumerate(_quarters(v.latent[half, p], 1)):
                v.integers[i, here] = quarter.astype(v.integers.dtype)
            latent_KC = jnp.concatenate([v.integers[i, here] for i in range(4)], axis=1)
            rope_RK = jnp.concatenate([x.astype(v.integers.dtype) for x in _quarters(v.rope[half, p], 0)], axis=0)
            scores.append(_dot(q_MC, latent_KC, (1, 1)) * c_1K + _dot(q_MR, rope_RK, (1, 0)) * r_1K)
            scales.append(c_1K)
        latent_SC = jnp.concatenate([v.integers[i] for i in range(4)], axis=1)
        return jnp.concatenate(scores, axis=1), latent_SC, jnp.concatenate(scales, axis=1)

    def finish(self, job: Array) -> None:
        """Starts the copies of a job's result, and resets the softmax for the next job."""
        pl.when(job - 2 >= self.first)(functools.partial(self.await_out, job - 2))
        v = self.vmem
        o_MC = v.sum[...] / jnp.sum(v.total[...], axis=1, keepdims=True)
        v.out[job % 2] = o_MC.astype(v.out.dtype).reshape(v.out.shape[1:])
        self._each_result(job, lambda copy: copy.start())
        self.reset()

    def await_out(self, job: Array) -> None:
        """Waits until a job's result is copied."""
        self._each_result(job, lambda copy: copy.wait())

    def reset(self) -> None:
        """Resets the running softmax."""
        v = self.vmem
        v.top[...] = jnp.full(v.top.shape, MASKED, jnp.float32)
        v.total[...] = jnp.zeros(v.total.shape, jnp.float32)
        v.sum[...] = jnp.zeros(v.sum.shape, jnp.float32)


def _quarters(page: Array, axis: int) -> Sequence[Array]:
    """The quarters of a page's rows as int8. Packed pages are unpacked four bytes at a time."""
    if page.dtype == jnp.int8:
        return jnp.split(page, 4, axis=axis)
    return [pltpu.bitcast(x, jnp.int8) for x in packing.unpack(pltpu.bitcast(page, jnp.uint32), axis)]


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
