"""The weight gradient of a grouped matrix product: each group's rows of one operand times those of the other.

The kernel sums a group's tiles in VMEM. It copies the result to HBM in pieces, while the group's last tile and the next
group run. Letters: P rows, E groups, D and F the columns of the two operands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import LANES, Ref, cost_estimate
from pallas_kernels.expert_dispatch.grouped_matmul import dot
from pallas_kernels.expert_dispatch.row_pipeline import (
    Act,
    RowStream,
    compiler_params,
    offset,
    round_up,
    start,
    wait,
)
from pallas_kernels.expert_dispatch.tiles import ALIGN, MIB, TilePlan, Tiles, chip, lay_out


def tgmm(
    lhs_PD: Array, rhs_PF: Array, group_sizes_E: Array, *, tiles: Tiles | None = None, name: str = "tgmm"
) -> Array:
    """lhs^T rhs over the rows of each group: [E, D, F] in lhs's dtype, sums in float32; zeros for an empty group.

    Rows after the sum of the group sizes are not read. name: of the kernel, in profiles and plans.
    """
    return tgmm_each(lhs_PD, (rhs_PF,), group_sizes_E, tiles=tiles, name=name)[0]


def tgmm_each(
    lhs_PD: Array, rhs: Sequence[Array], group_sizes_E: Array, *, tiles: Tiles | None = None, name: str = "tgmm"
) -> list[Array]:
    """tgmm(lhs, r) for each r of rhs, all [P, F]: lhs is read and transposed once."""
    given, pairs, depth, width = lhs_PD.shape[0], round_up(lhs_PD.shape[0]), lhs_PD.shape[1], rhs[0].shape[1]
    experts, dtype, many = group_sizes_E.shape[0], lhs_PD.dtype, len(rhs)
    if pairs != given:
        lhs_PD, *rhs = (jnp.pad(a, ((0, pairs - given), (0, 0))) for a in (lhs_PD, *rhs))
    tiles = tiles or fit(pairs, depth, width * many, dtype)
    block = tiles.width(depth)

    def kernel(sizes_E: Ref, *refs: Ref) -> None:
        hbm, results, refs = refs[: 1 + many], refs[1 + many : 1 + 2 * many], refs[1 + 2 * many :]
        s, refs = TilePlan(*refs[: len(TilePlan._fields)]), refs[len(TilePlan._fields) :]
        vmem, sums, parts = refs[: 1 + many], refs[1 + many : 1 + 2 * many], refs[1 + 2 * many : 1 + 3 * many]
        *transposed, loading, storing = refs[1 + 3 * many :]
        lay_out(s, sizes_E, pairs, tiles, empty=True)
        operands = [RowStream(h, v, loading.at[i]) for i, (h, v) in enumerate(zip(hbm, vmem, strict=True))]
        sums = [GroupSum(*refs) for refs in zip(results, parts, sums, strict=True)]
        _GradientKernel(s, operands, sums, transposed, storing, tiles, pl.program_id(0), s.totals_2[0]).run()

    shapes = [jax.ShapeDtypeStruct((experts, depth, width), dtype)] * many
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.blocks,),
            in_specs=[anywhere] * (1 + many),
            out_specs=[anywhere] * many,
            scratch_shapes=[
                *TilePlan.scratch(experts, pairs, tiles),
                pltpu.VMEM((2, tiles.rows, block), dtype),
                *[pltpu.VMEM((2, tiles.rows, width), dtype)] * many,
                *[pltpu.VMEM((block, width), jnp.float32)] * many,
                *[pltpu.VMEM((block, width), dtype)] * many,
                *[pltpu.VMEM((tiles.chunk, tiles.rows), dtype)] * 2,
                pltpu.SemaphoreType.DMA((1 + many, 2)),
                pltpu.SemaphoreType.DMA((many, -(-block // (2 * tiles.chunk)))),
            ],
        ),
        out_shape=shapes,
        compiler_params=compiler_params(),
        cost_estimate=cost_estimate(2 * pairs * depth * width * many, [lhs_PD, *rhs, *shapes]),
        name=name,
    )(group_sizes_E, lhs_PD, *rhs)


class GroupSum(NamedTuple):
    """A result in HBM, and a group's column block of it in VMEM: in its dtype and, while tiles add up, in float32."""

    hbm: Ref
    part: Ref
    total: Ref


class _GradientKernel(NamedTuple):
    """One block of lhs's columns: runs all tiles in order, while the next tile's rows arrive."""

    plan: TilePlan
    operands: list[RowStream]
    results: list[GroupSum]
    transposed: Sequence[Ref]  # two buffers
    storing: Ref  # semaphores
    tiles: Tiles
    block: Array
    tile_count: Array

    @property
    def chunks(self) -> int:
        return self.results[0].part.shape[0] // self.tiles.chunk

    def run(self) -> None:
        @pl.when(self.tile_count > 0)
        def _() -> None:
            self.load(jnp.int32(0), start)

        lax.fori_loop(0, self.tile_count, self.tile, None)

        @pl.when(self.plan.totals_2[1] > 0)
        def _() -> None:
            for c in range(0, self.chunks, 2):
                self.store(self.plan.totals_2[1] - 1, jnp.int32(c), min(2, self.chunks - c), wait)

    def tile(self, i: Array, _: None) -> None:
        s, step = self.plan, self.tiles.step
        slot, number, rows = i % 2, s.number_I[i], s.count_I[i]

        @pl.when(i + 1 < self.tile_count)
        def _() -> None:
            self.load(i + 1, start)

        self.load(i, wait)
        last = s.index_I[i] + 1 == s.tiles_J[number]
        for height in range(0, self.tiles.rows + 1, step):

            @pl.when((rows > height - step) & (rows <= height))
            def _(height: int = height) -> None:
                if height:
                    for stream in self.operands:
                        _blank(stream.vmem.at[slot], s.skip_I[i], rows, height)

                for ends in (False, True):

                    @pl.when(last == ends)
                    def _(ends: bool = ends) -> None:
                        self.multiply(height, slot, number, s.index_I[i] == 0, ends)

    def load(self, i: Array, act: Act) -> None:
        for stream in self.operands:
            stream.copy(act, i % 2, self.plan.row_I[i], round_up(self.plan.count_I[i]), self.block)

    def store(self, number: Array, c: Array, many: int, act: Act) -> None:
        """The DMAs of `many` chunks of a group's result, from chunk c on."""
        chunk = self.tiles.chunk
        for r, (hbm, part, _) in enumerate(self.results):
            row = pl.multiple_of(offset(self.block, hbm.shape[1], part.shape[0]) + c * chunk, ALIGN)
            far = hbm.at[self.plan.group_J[number], pl.ds(row, many * chunk)]
            near = part.at[pl.ds(pl.multiple_of(c * chunk, ALIGN), many * chunk)]
            act(pltpu.make_async_copy(near, far, self.storing.at[r, lax.shift_right_logical(c, 1)]))

    def multiply(self, height: int, slot: Array, number: Array, first: Array, last: bool) -> None:
        """One tile: chunks in pairs; a chunk is transposed while the other is multiplied."""

        def pair(c: Array, many: int) -> None:
            if last:

                @pl.when(number > 0)
                def _() -> None:
                    self.store(number - 1, c, many, wait)

            for i in range(many):
                if height:
                    self.transpose(height, slot, c + i + 1, self.transposed[1 - i])
                self.product(height, slot, c + i, self.transposed[i], first, last)
            if last:
                self.store(number, c, many, start)

        if height:
            self.transpose(height, slot, jnp.int32(0), self.transposed[0])
        if self.chunks > 1:
            lax.fori_loop(0, self.chunks // 2, lambda j, _: pair(2 * j, 2), None)
        if self.chunks % 2:
            pair(jnp.int32(self.chunks - 1), 1)

    def transpose(self, height: int, slot: Array, c: Array, into: Ref) -> None:
        chunk = self.tiles.chunk
        at = pl.ds(pl.multiple_of(jnp.minimum(c, self.chunks - 1) * chunk, LANES), chunk)
        into[:, pl.ds(0, height)] = self.operands[0].vmem[slot, pl.ds(0, height), at].T

    def product(self, height: int, slot: Array, c: Array, transposed: Ref, first: Array, last: bool) -> None:
        """Adds a chunk's product to its sums; the last tile of a group writes them in the result's dtype."""
        chunk, width = self.tiles.chunk, self.results[0].part.shape[1]
        at = pl.ds(pl.multiple_of(c * chunk, LANES), chunk)
        value = jnp.zeros((chunk, len(self.results) * width), jnp.float32)
        if height:
            rhs = jnp.concatenate([o.vmem[slot, pl.ds(0, height)] for o in self.operands[1:]], axis=1)
            value = dot(transposed[:, pl.ds(0, height)], rhs)
        for r, (_, part, total) in enumerate(self.results):
            result = value[:, r * width : (r + 1) * width]
            if height:
                result += jnp.where(first, 0, total[at])
            target = part if last else total
            target[at] = result.astype(target.dtype)


def _blank(tile: Ref, skip: Array, count: Array, height: int) -> None:
    """Sets the tile's rows before `skip` and from `count` to `height` to 0: they are other groups' or unwritten."""
    width = tile.shape[1]
    row = lax.broadcasted_iota(jnp.int32, (ALIGN, width), 0)

    @pl.when(skip > 0)
    def _() -> None:
        tile[pl.ds(0, ALIGN)] = jnp.where(row < skip, 0, tile[pl.ds(0, ALIGN)])

    def rows(i: Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(i * ALIGN, ALIGN), ALIGN)
        tile[at] = jnp.where(row + i * ALIGN < count, tile[at], 0)

    lax.fori_loop(lax.shift_right_logical(count, 4), height // ALIGN, rows, None)


def fit(pairs: int, depth: int, width: int, dtype: jnp.dtype) -> Tiles:
    """Tiles that fit the chip's VMEM, with the fewest column blocks of lhs, because each block reads rhs again."""
    info, size = chip(), jnp.dtype(dtype).itemsize
    step = info.mxu_column_size  # rows that an MXU contracts at a time
    for rows in (n for n in (1024, 512, 256) if n == 256 or n < 2 * pairs):
        for blocks in range(min(info.num_cores, depth // LANES), depth // LANES + 1, info.num_cores):
            block = Tiles(rows=rows, step=step, chunk=LANES, blocks=blocks).width(depth)
            chunk = 2 * LANES if block % (2 * LANES) == 0 else LANES
            moving = 2 * rows * (block + width) * size + block * width * (4 + size)
            temporary = 2 * chunk * rows * size + 4 * chunk * width * 4
            if moving + temporary <= info.vmem_capacity_bytes - 4 * MIB:
                return Tiles(rows=rows, step=step, chunk=chunk, blocks=blocks)
    raise ValueError(f"a weight gradient {width} wide does not fit {info.vmem_capacity_bytes} bytes of VMEM")
