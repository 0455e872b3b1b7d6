"""How the rows of uneven groups are cut into tiles: lists of integers that a kernel makes for itself in scalar memory.

Made there because the same in XLA is some twenty small operations, each of them dearer than the whole list.

Groups lie one behind the other from row 0. A tile holds rows of one group; it starts at a multiple of ALIGN, so its
first rows may belong to the group before it. Letters: P rows, E groups, I tiles, J filled groups.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.constants import LANES

ALIGN = 16  # rows: DMAs start and end at multiples of it; the height of a packed bfloat16 register
PIECES = 8  # a group's weights arrive in so many DMAs (of 8 bits, half), spread over the tiles of the group before
MIB = 2**20

Ref = Any  # what Pallas hands a kernel: memory that reads and writes like an array; it has no public type


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The sizes of a kernel's tiles. Results do not depend on them (but for the order of sums), only cost does."""

    rows: int  # at most so many rows a tile; a power of two
    step: int  # a tile's height is rounded up to a multiple of it, one compiled body for each; a power of two
    chunk: int  # columns multiplied at a time
    blocks: int = 1  # column blocks, each its own pass over the rows; the cores of a chip share them

    def __post_init__(self):
        if not ALIGN <= self.step <= self.rows or any(n & (n - 1) for n in (self.step, self.rows)):
            raise ValueError(f"step and rows must be powers of two, {ALIGN} <= step <= rows: {self.step}, {self.rows}")
        if self.chunk % LANES:
            raise ValueError(f"chunk must be a multiple of {LANES}: {self.chunk}")

    def width(self, columns: int) -> int:
        """How many of the columns a column block has: a multiple of LANES."""
        return -(-columns // (self.blocks * LANES)) * LANES


def chip() -> pltpu.TpuInfo:
    """The chip compiled for: that of the mesh in use, or of JAX's default device; a v5p where there is no TPU."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)


def fit(pairs: int, columns: int, depth: int, *, whole: int, split: int, weights: int, step: int) -> Tiles:
    """Tiles that fit the chip's VMEM: as few column blocks as its cores allow, since each reads `whole` again.

    pairs: rows there are. depth: what a product sums over. In bytes: whole of a row's operands that are not cut into
    column blocks; split of what a row has for each column; weights of a column of the weights. step: see Tiles.
    """
    info = chip()
    cores = min(info.num_cores, columns // LANES)
    for rows in (n for n in (8 * step, 4 * step, 2 * step, step) if n == step or n < 2 * pairs):
        for blocks in range(cores, columns // LANES + 1, cores):
            tiles = Tiles(rows=rows, step=step, chunk=LANES, blocks=blocks)
            width = tiles.width(columns)
            if 2 * rows * (whole + split * width) + 2 * weights * width <= info.vmem_capacity_bytes - 10 * MIB:
                return replace(tiles, chunk=_chunk(width, depth, info))
    raise ValueError(f"weights of {weights} bytes a column do not fit {info.vmem_capacity_bytes} bytes of VMEM")


def _chunk(width: int, depth: int, info: pltpu.TpuInfo) -> int:
    """Columns to multiply at a time: many, since the MXU drains behind them, but a product's code is unrolled."""
    unit = info.mxu_column_size
    unrolled = 512 * 5120 if info.generation < 6 else 768 * 5120  # the longest that estimates still reward
    most = max(unrolled // depth & -unit, unit)
    even = max((n for n in range(unit, min(most, width) + 1, unit) if width % n == 0), default=0)
    return even if 2 * even >= min(most, width) else min(most, width)


class Plan(NamedTuple):
    """Scalar memory that `lay_out` fills. Tiles in row order; entries behind the last tile or group mean nothing."""

    totals_2: Ref  # number of tiles, number of groups that have any
    group_J: Ref  # the groups that have tiles
    tiles_J: Ref  # how many
    number_I: Ref  # the tile's group, as an index into the two above
    index_I: Ref  # the tile's place among its group's tiles
    row_I: Ref  # first row, a multiple of ALIGN
    skip_I: Ref  # leading rows that belong to the group before
    count_I: Ref  # rows from `row` to the end of the tile, the skipped ones included

    @staticmethod
    def scratch(experts: int, rows: int, tiles: Tiles) -> list[Any]:
        """What to ask of pallas_call as scratch, in this order, for groups within `rows` rows."""
        most = -(-rows // tiles.rows) + 2 * experts
        sizes = 2, experts, experts, most, most, most, most, most
        return [pltpu.SMEM((n,), jnp.int32) for n in sizes]


def lay_out(plan: Plan, sizes_E: Ref, rows: int, tiles: Tiles, *, empty: bool = False) -> None:
    """Plans the tiles of groups of the given sizes, as far as they lie within `rows` rows, inside a kernel.

    A group's tiles are of about equal height, not full ones and a small rest: every tile then gives the DMAs behind it
    time. The rounding up to `step` is paid once a group. empty: an empty group gets a tile of no rows.
    """

    def group(e: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        begin, tile, number = carry
        end = jnp.minimum(begin + sizes_E[e], rows)
        row = begin & -ALIGN
        span = jnp.where(end > begin, end - row, 0)
        steps = _steps(span, tiles.step)
        count = jnp.maximum(_steps(span, tiles.rows), int(empty))
        low = divide(steps, count, tiles.rows // tiles.step)
        higher = steps - low * count  # so many tiles are a step higher

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
    """How many steps cover the rows."""
    return lax.shift_right_logical(rows + step - 1, step.bit_length() - 1)


def divide(a: Array, b: Array, most: int) -> Array:
    """a // b, at most `most`, by comparing: the scalar unit has no division."""
    return sum(((b * n <= a).astype(jnp.int32) for n in range(1, most + 1)), start=jnp.int32(0))
