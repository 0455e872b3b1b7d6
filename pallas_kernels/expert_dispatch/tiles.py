"""Splits the rows of uneven groups into tiles: lists of integers that a kernel computes in scalar memory.

XLA needs about twenty small operations for the same lists, and each of them costs more than all lists in the kernel.

Groups follow each other from row 0. A tile holds rows of one group; it starts at a multiple of ALIGN, so its first rows
may belong to the group before. Letters: P rows, E groups, I tiles, J groups that have rows.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import LANES, Ref

ALIGN = 16  # rows, the height of a packed bfloat16 register: DMAs start and end at multiples of it
PIECES = 8  # DMAs of a group's weights (half as many in 8 bits), spread over the tiles of the group before
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The sizes of a kernel's tiles. Results do not depend on them, except by the order of sums."""

    rows: int  # maximum height of a tile; a power of two
    step: int  # tile heights are multiples of it, each with its own compiled body; a power of two
    chunk: int  # columns multiplied at a time
    blocks: int = 1  # number of column blocks, each of which reads all rows; the cores of a chip split them

    def __post_init__(self):
        if not ALIGN <= self.step <= self.rows or any(n & (n - 1) for n in (self.step, self.rows)):
            raise ValueError(f"step and rows must be powers of two, {ALIGN} <= step <= rows: {self.step}, {self.rows}")
        if self.chunk % LANES:
            raise ValueError(f"chunk must be a multiple of {LANES}: {self.chunk}")

    def width(self, columns: int) -> int:
        """Columns of a column block, a multiple of LANES."""
        return -(-columns // (self.blocks * LANES)) * LANES


def chip() -> pltpu.TpuInfo:
    """The target chip: that of the mesh in use, else of JAX's default device; a v5p if there is no TPU."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)


def fit(pairs: int, columns: int, depth: int, *, uncut: int, cut: int, weights: int, step: int) -> Tiles:
    """Tiles that fit the chip's VMEM, with the fewest column blocks, because each block reads the `uncut` bytes again.

    Raises ValueError if nothing fits.

    Args:
      pairs: Number of rows.
      columns: Columns of the weights.
      depth: The contracted size of a product.
      uncut: Bytes per row of the operands that every column block reads.
      cut: Bytes per row and column of the operands and results that are split by column.
      weights: Bytes per column of the weights.
      step: See Tiles.
    """
    info = chip()
    cores = min(info.num_cores, columns // LANES)
    for rows in (n for n in (8 * step, 4 * step, 2 * step, step) if n == step or n < 2 * pairs):
        for blocks in range(cores, columns // LANES + 1, cores):
            tiles = Tiles(rows=rows, step=step, chunk=LANES, blocks=blocks)
            width = tiles.width(columns)
            if 2 * rows * (uncut + cut * width) + 2 * weights * width <= info.vmem_capacity_bytes - 10 * MIB:
                return replace(tiles, chunk=_chunk(width, depth, info))
    raise ValueError(f"weights of {weights} bytes per column do not fit {info.vmem_capacity_bytes} bytes of VMEM")


def _chunk(width: int, depth: int, info: pltpu.TpuInfo) -> int:
    """Columns to multiply at a time: many, as the MXU drains after each product, but not all, as code is unrolled."""
    unit = info.mxu_column_size
    unrolled = 512 * 5120 if info.generation < 6 else 768 * 5120  # larger values do not lower the estimates
    limit = max(unrolled // depth & -unit, unit)
    even = max((n for n in range(unit, min(limit, width) + 1, unit) if width % n == 0), default=0)
    return even if 2 * even >= min(limit, width) else min(limit, width)


class TilePlan(NamedTuple):
    """Scalar memory that `lay_out` fills, tiles in row order. Entries after the last tile or group are undefined."""

    totals_2: Ref  # number of tiles, and of groups that have tiles
    group_J: Ref  # the groups that have tiles
    tiles_J: Ref  # their numbers of tiles
    number_I: Ref  # the tile's group, as an index into the two above
    index_I: Ref  # the tile's index among its group's tiles
    row_I: Ref  # first row, a multiple of ALIGN
    skip_I: Ref  # leading rows that belong to the group before
    count_I: Ref  # rows from `row` to the end of the tile, with the skipped ones

    @staticmethod
    def scratch(experts: int, rows: int, tiles: Tiles) -> list[Any]:
        """Scratch shapes for pallas_call, in this order, for groups within `rows` rows."""
        limit = -(-rows // tiles.rows) + 2 * experts
        sizes = 2, experts, experts, limit, limit, limit, limit, limit
        return [pltpu.SMEM((n,), jnp.int32) for n in sizes]


def lay_out(plan: TilePlan, sizes_E: Ref, rows: int, tiles: Tiles, *, empty: bool = False) -> None:
    """Plans the tiles of groups of the given sizes, up to row `rows`. Runs inside a kernel.

    A group's tiles have about equal heights, so that each takes long enough to hide the next DMAs. A small last tile
    would not. The height is rounded up to `step` once per group. empty: gives an empty group a tile without rows.
    """

    def group(e: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        begin, tile, number = carry
        end = jnp.minimum(begin + sizes_E[e], rows)
        row = begin & -ALIGN
        span = jnp.where(end > begin, end - row, 0)
        steps = _steps(span, tiles.step)
        count = jnp.maximum(_steps(span, tiles.rows), int(empty))
        low = divide(steps, count, tiles.rows // tiles.step)
        higher = steps - low * count  # number of tiles that are one step higher

        @pl.when(count > 0)
        def _() -> None:
            plan.group_J[number] = e
            plan.tiles_J[number] = count

        def one(i: Array, _: None) -> None:
            offset = (i * low + jnp.minimum(i, higher)) * tiles.step
            height = (low + (i < higher)) * tiles.step
            plan.number_I[tile + i] = number
            plan.index_I[tile + i] = i
            plan.row_I[tile + i] = row + offset
            plan.skip_I[tile + i] = jnp.where((i == 0) & (span > 0), begin - row, 0)
            plan.count_I[tile + i] = jnp.minimum(height, span - offset)

        lax.fori_loop(0, count, one, None)
        return end, tile + count, number + (count > 0).astype(jnp.int32)

    zero = jnp.int32(0)
    _, plan.totals_2[0], plan.totals_2[1] = lax.fori_loop(0, sizes_E.shape[0], group, (zero, zero, zero))


def _steps(rows: Array, step: int) -> Array:
    """Steps that cover the rows."""
    return lax.shift_right_logical(rows + step - 1, step.bit_length() - 1)


def divide(a: Array, b: Array, limit: int) -> Array:
    """min(a // b, limit), by comparisons: the scalar unit has no division."""
    return sum(((b * n <= a).astype(jnp.int32) for n in range(1, limit + 1)), start=jnp.int32(0))
