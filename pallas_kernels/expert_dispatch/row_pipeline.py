"""Runs a body over the tiles of uneven groups: rows, results and each group's weights stream through VMEM meanwhile.

All DMAs are the kernel's own, because the automatic pipeline looks one step ahead, and a group's weights take longer to
arrive than a tile takes to compute: here they come in pieces spread over all tiles of the group before, behind the rows
of the next tile, which are needed sooner. Only rows of filled groups move. Letters as in tiles.py; C column blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.constants import LANES
from pallas_kernels.expert_dispatch.tiles import (
    ALIGN,
    MIB,
    PIECES,
    Plan,
    Ref,
    Tiles,
    chip,
    divide,
    fit,
    lay_out,
)
from pallas_kernels.quantized import Quantized, Weight

Act = Callable[[Any], None]  # start or wait
Number = TypeVar("Number", Array, int)


def start(copy: Any) -> None:
    copy.start()


def wait(copy: Any) -> None:
    copy.wait()


class Rows(NamedTuple):
    """An operand or result with one row a pair, in HBM and in two VMEM buffers that tiles use in turn."""

    hbm: Ref
    vmem: Ref  # [2, tile rows, columns]
    semaphores: Ref  # [2]

    def copy(self, act: Act, slot: Array, row: Array, count: Array, block: Array, out: bool = False) -> None:
        """Starts or waits for the DMAs of `count` rows, a multiple of ALIGN: one a bit, as a DMA's size is static."""
        width = self.vmem.shape[2]
        column = offset(block, self.hbm.shape[1], width)
        size = 1 << (min(self.vmem.shape[1], self.hbm.shape[0]).bit_length() - 1)
        while size >= ALIGN:

            @pl.when(count & size != 0)
            def _(size: int = size) -> None:
                done = pl.multiple_of(count & -(2 * size), ALIGN)
                far = self.hbm.at[pl.ds(pl.multiple_of(row + done, ALIGN), size), pl.ds(column, width)]
                near = self.vmem.at[slot, pl.ds(done, size)]
                source, target = (near, far) if out else (far, near)
                act(pltpu.make_async_copy(source, target, self.semaphores.at[slot]))

            size //= 2


class Weights(NamedTuple):
    """A weight of every group in HBM, and two groups' column block of it in VMEM."""

    hbm: Ref  # [E, D, F]
    vmem: Ref  # [2, D, F / C], or [2, D / C, F]
    semaphores: Ref  # [2]
    scale: Ref | None  # [E, 1, F], all of it in VMEM, if they are quantized

    @property
    def align(self) -> int:
        """Rows: DMAs start and end at multiples of it. A packed register of 8 bits is 32 high."""
        return max(ALIGN, 32 // self.hbm.dtype.itemsize)

    def copy(self, act: Act, slot: Array, group: Array, block: Array, low: Array | int, size: int) -> None:
        """Starts or waits for one DMA: `size` rows from row `low` on of this column block."""
        _, height, width = self.vmem.shape
        row = pl.multiple_of(jnp.int32(low) + offset(block, self.hbm.shape[1], height), self.align)
        column = offset(block, self.hbm.shape[2], width)
        far = self.hbm.at[group, pl.ds(row, size), pl.ds(column, width)]
        near = self.vmem.at[slot, pl.ds(pl.multiple_of(jnp.int32(low), self.align), size)]
        act(pltpu.make_async_copy(far, near, self.semaphores.at[slot]))


def offset(block: Array, columns: int, width: int) -> Array | int:
    """First column of a column block. The last block ends with the last column, so it may overlap the one before: both
    then write the same numbers to the same place."""
    return 0 if width == columns else pl.multiple_of(jnp.minimum(block * width, columns - width), LANES)


class Tile(NamedTuple):
    """What a body works on: refs of `height` rows, and one group's column block of each weight."""

    height: int
    chunk: int  # columns to multiply at a time
    repeated: Array  # so many leading columns are in the column block before, too
    rows: list[Ref]
    weights: list[Ref]
    scales: list[Ref]  # [1, columns] of each weight, if they are quantized: none, or as many
    results: list[Ref]

    def scaled(self, products: Sequence[Array], at: slice | pl.Slice) -> Sequence[Array]:
        """Columns `at` of the products with each weight's values, times its scales."""
        if not self.scales:
            return products
        return [product * scale[:, at] for product, scale in zip(products, self.scales, strict=True)]


Body = Callable[[Tile], None]


def over_rows(
    body: Body,
    sizes_E: Array,
    rows: Sequence[Array],
    weights: Sequence[Weight],
    results: Sequence[tuple[int, jnp.dtype]],
    *,
    weight_axis: int,
    depth: int,
    split: Sequence[bool],
    name: str,
    tiles: Tiles | None,
) -> list[Array]:
    """Results [P, width] of the body run on every tile.

    rows: arrays [P, *]; `split` says which are cut into column blocks like the results, the others come whole. weights:
    arrays [E, *, *], cut along weight_axis; or all of them quantized, with scales [E, 1, *] along axis 2, which is then
    the one. results: (width, dtype); one as wide as the weights is cut into column blocks, one of LANES columns is
    returned with as many for every block. depth: what a product sums over. Rows behind the sum of sizes_E are neither
    read nor written: those of the results are undefined.
    """
    scales = [w.scale for w in weights if isinstance(w, Quantized)]
    assert not scales or (len(scales) == len(weights) and weight_axis == 2)
    values = [w.values if isinstance(w, Quantized) else w for w in weights]
    given, columns = rows[0].shape[0], values[0].shape[weight_axis]
    pairs = round_up(given)
    if pairs != given:
        rows = [jnp.pad(a, ((0, pairs - given), (0, 0))) for a in rows]
    tiles = tiles or _fit(pairs, columns, depth, rows, values, results, split)
    width = tiles.width(columns)
    a, b, c = len(rows), len(values), len(results)

    def kernel(sizes_E: Ref, *refs: Ref) -> None:
        resident, refs = refs[: len(scales)] or [None] * b, refs[len(scales) :]
        hbm, refs, fields = refs[: a + b + c], refs[a + b + c :], len(Plan._fields)
        s, refs = Plan(*refs[:fields]), refs[fields:]
        vmem, carries, semaphores = refs[: a + b + c], refs[a + b + c : -1], refs[-1]
        lay_out(s, sizes_E, pairs, tiles)
        streams = [(h, v, semaphores.at[i]) for i, (h, v) in enumerate(zip(hbm, vmem, strict=True))]
        _pipeline(
            body,
            s,
            [Rows(*x) for x in streams[:a]],
            [Weights(*x, scale) for x, scale in zip(streams[a : a + b], resident, strict=True)],
            [Rows(*x) for x in streams[a + b :]],
            carries,
            tiles,
            columns,
        )

    weight_shapes = [(width, w.shape[2]) if weight_axis == 1 else (w.shape[1], width) for w in values]
    result_widths = [width if n == columns else n for n, _ in results]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    shapes = [jax.ShapeDtypeStruct((pairs, n if n == columns else n * tiles.blocks), dtype) for n, dtype in results]
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.blocks,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(scales) + [anywhere] * (a + b),
            out_specs=[anywhere] * c,
            scratch_shapes=[
                *Plan.scratch(sizes_E.shape[0], pairs, tiles),
                *(
                    pltpu.VMEM((2, tiles.rows, width if cut else r.shape[1]), r.dtype)
                    for r, cut in zip(rows, split, strict=True)
                ),
                *(pltpu.VMEM((2, *shape), w.dtype) for shape, w in zip(weight_shapes, values, strict=True)),
                *(pltpu.VMEM((2, tiles.rows, n), r[1]) for n, r in zip(result_widths, results, strict=True)),
                *(pltpu.VMEM((ALIGN, n), r[1]) for n, r in zip(result_widths, results, strict=True)),
                pltpu.SemaphoreType.DMA((a + b + c, 2)),
            ],
        ),
        out_shape=shapes,
        compiler_params=compiler_params(),
        cost_estimate=work(2 * pairs * sum(w[0].size for w in values), [*scales, *rows, *values, *shapes]),
        name=name,
    )(sizes_E, *scales, *rows, *values)
    return [r[:given] for r in made] if pairs != given else made


def _fit(
    pairs: int,
    columns: int,
    depth: int,
    rows: Sequence[Array],
    weights: Sequence[Array],
    results: Sequence[tuple[int, jnp.dtype]],
    split: Sequence[bool],
) -> Tiles:
    whole = sum(a.shape[1] * a.dtype.itemsize for a, cut in zip(rows, split, strict=True) if not cut)
    parts = sum(a.dtype.itemsize for a, cut in zip(rows, split, strict=True) if cut)
    parts += sum(jnp.dtype(dtype).itemsize for _, dtype in results)
    size = sum(w.size // (w.shape[0] * columns) * w.dtype.itemsize for w in weights)
    # Weights in 8 bits are for generation: groups are small, and half the bytes no longer hide the MXU's work on rows
    # that only fill a tile.
    step = 32 if weights[0].dtype.itemsize == 1 else 64
    return fit(pairs, columns, depth, whole=whole, split=parts, weights=size, step=step)


def _pipeline(
    body: Body,
    s: Plan,
    rows: list[Rows],
    weights: list[Weights],
    results: list[Rows],
    carries: Sequence[Ref],
    tiles: Tiles,
    columns: int,
) -> None:
    """One column block: its tiles in turn, while the next tile's rows and the next group's weights come in."""
    block, count = pl.program_id(0), s.totals_2[0]
    pieces = PIECES * ALIGN // max(stream.align for stream in weights)

    def load(i: Array, act: Act) -> None:
        for stream in rows:
            stream.copy(act, i % 2, s.row_I[i], round_up(s.count_I[i]), block)

    def store(i: Array, act: Act) -> None:
        # A row block that the next group shares is left to it (see `carry`): no row is written twice.
        written = jnp.where(i == count - 1, round_up(s.count_I[i]), s.count_I[i] & -ALIGN)
        for stream in results:
            stream.copy(act, i % 2, s.row_I[i], written, block, out=True)

    def fetch(number: Array, low: Array, high: Array) -> None:
        """Starts pieces low to high of the weights of a filled group, by its number."""

        def piece(p: Array, _: None) -> None:
            for stream in weights:
                size = stream.vmem.shape[1] // pieces
                stream.copy(start, number % 2, s.group_J[number], block, p * size, size)

        lax.fori_loop(low, high, piece, None)

    @pl.when(count > 0)
    def _() -> None:
        load(jnp.int32(0), start)
        fetch(jnp.int32(0), jnp.int32(0), jnp.int32(pieces))

    def tile(i: Array, _: None) -> None:
        number = s.number_I[i]

        @pl.when(i + 1 < count)
        def _() -> None:
            load(i + 1, start)

        @pl.when(s.index_I[i] == 0)
        def _() -> None:
            for stream in weights:
                stream.copy(wait, number % 2, s.group_J[number], block, 0, stream.vmem.shape[1])

        @pl.when(number + 1 < s.totals_2[1])
        def _() -> None:
            low, high = (divide(pieces * (s.index_I[i] + n), s.tiles_J[number], pieces) for n in (0, 1))
            fetch(number + 1, low, high)

        load(i, wait)

        @pl.when(i > 1)
        def _() -> None:
            store(i - 2, wait)

        _multiply(body, s, i, block, rows, weights, results, tiles, columns)
        for stream, kept in zip(results, carries, strict=True):
            carry(stream.vmem.at[i % 2], kept, s.skip_I[i], s.count_I[i])
        store(i, start)

    lax.fori_loop(0, count, tile, None)
    for last in (2, 1):

        @pl.when(count >= last)
        def _(last: int = last) -> None:
            store(count - last, wait)


def _multiply(
    body: Body,
    s: Plan,
    i: Array,
    block: Array,
    rows: list[Rows],
    weights: list[Weights],
    results: list[Rows],
    tiles: Tiles,
    columns: int,
) -> None:
    """Runs the body on tile i: it is compiled for every height, and the lowest that holds the tile runs."""
    slot, rest = i % 2, s.number_I[i] % 2
    width = tiles.width(columns)
    repeated = block * width - offset(block, columns, width)
    scales = [
        w.scale.at[s.group_J[s.number_I[i]], :, pl.ds(offset(block, columns, width), width)]
        for w in weights
        if w.scale is not None
    ]
    for height in range(tiles.step, tiles.rows + 1, tiles.step):

        @pl.when((s.count_I[i] > height - tiles.step) & (s.count_I[i] <= height))
        def _(height: int = height) -> None:
            operands, made = ([r.vmem.at[slot, pl.ds(0, height)] for r in x] for x in (rows, results))
            body(Tile(height, tiles.chunk, repeated, operands, [w.vmem.at[rest] for w in weights], scales, made))


def carry(tile: Ref, kept: Ref, skip: Array, count: Array) -> None:
    """Takes the rows of the group before from `kept` into the tile's head, and keeps the rows behind its last ALIGN."""

    @pl.when(skip > 0)
    def _() -> None:
        row = lax.broadcasted_iota(jnp.int32, kept.shape, 0)
        tile[pl.ds(0, ALIGN)] = jnp.where(row < skip, kept[...], tile[pl.ds(0, ALIGN)])

    @pl.when(count % ALIGN > 0)
    def _() -> None:
        kept[...] = tile[pl.ds(pl.multiple_of(count & -ALIGN, ALIGN), ALIGN)]


def round_up(count: Number) -> Number:
    """To a multiple of ALIGN."""
    return (count + ALIGN - 1) & -ALIGN


def work(flops: int, arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> pl.CostEstimate:
    """What XLA is told of a kernel, to schedule transfers beside it: products, and every array moved once."""
    moved = sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def compiler_params() -> pltpu.CompilerParams:
    """Nearly all of the chip's VMEM; column blocks shared by the cores of a megacore."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",),
        vmem_limit_bytes=chip().vmem_capacity_bytes - 2 * MIB,
        disable_bounds_checks=True,  # they cost 2% of a kernel that starts many small DMAs; interpret mode makes them
        disable_semaphore_checks=True,
    )
