"""Runs a body on the tiles of uneven groups, while rows, results and each group's weights stream through VMEM.

The kernel starts all DMAs itself. Pallas's automatic pipeline looks one step ahead, but a group's weights take longer
to arrive than a tile takes to compute. Here they arrive in pieces, spread over all tiles of the group before. The rows
of the next tile come first, because they are needed sooner. Rows after the last group are not copied. Letters as in
tiles.py; C column blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import LANES, Ref, cost_estimate
from pallas_kernels.expert_dispatch.tiles import (
    ALIGN,
    MIB,
    PIECES,
    TilePlan,
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


class RowStream(NamedTuple):
    """An operand or result with one row per pair, in HBM and in two VMEM buffers that alternate."""

    hbm: Ref
    vmem: Ref  # [2, tile rows, columns]
    semaphores: Ref  # [2]

    def copy(self, act: Act, slot: Array, row: Array, count: Array, block: Array, out: bool = False) -> None:
        """Starts or waits for the DMAs of `count` rows, a multiple of ALIGN.

        There is one DMA for each set bit of `count`, because DMA sizes are static.
        """
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


class WeightStream(NamedTuple):
    """A weight of every group in HBM, and its column block for two groups in VMEM."""

    hbm: Ref  # [E, D, F]
    vmem: Ref  # [2, D, F / C], or [2, D / C, F]
    semaphores: Ref  # [2]
    scale: Ref | None  # [E, 1, F] in VMEM, if the weight is quantized

    @property
    def align(self) -> int:
        """DMAs start and end at multiples of this number of rows. A packed register of 8 bits has 32 rows."""
        return max(ALIGN, 32 // self.hbm.dtype.itemsize)

    def copy(self, act: Act, slot: Array, group: Array, block: Array, low: Array | int, size: int) -> None:
        """Starts or waits for the DMA of `size` rows of this column block, from row `low` on."""
        _, height, width = self.vmem.shape
        row = pl.multiple_of(jnp.int32(low) + offset(block, self.hbm.shape[1], height), self.align)
        column = offset(block, self.hbm.shape[2], width)
        far = self.hbm.at[group, pl.ds(row, size), pl.ds(column, width)]
        near = self.vmem.at[slot, pl.ds(pl.multiple_of(jnp.int32(low), self.align), size)]
        act(pltpu.make_async_copy(far, near, self.semaphores.at[slot]))


def offset(block: Array, columns: int, width: int) -> Array | int:
    """First column of a column block.

    The last block ends at the last column, so it may overlap the one before. Both write the same numbers there.
    """
    return 0 if width == columns else pl.multiple_of(jnp.minimum(block * width, columns - width), LANES)


class Streams(NamedTuple):
    """All arrays that a kernel copies. carries: [ALIGN, columns] for each result, rows of the group before."""

    rows: list[RowStream]
    weights: list[WeightStream]
    results: list[RowStream]
    carries: Sequence[Ref]


class Tile(NamedTuple):
    """The arguments of a body: refs of `height` rows, and one group's column block of each weight."""

    height: int
    chunk: int  # columns to multiply at a time
    repeated: Array  # leading columns that the column block before has, too
    rows: list[Ref]
    weights: list[Ref]
    scales: list[Ref]  # [1, columns] for each weight, empty if they are not quantized
    results: list[Ref]

    def scaled(self, products: Sequence[Array], at: slice | pl.Slice) -> Sequence[Array]:
        """Columns `at` of the products with each weight's values, times its scales."""
        if not self.scales:
            return products
        return [product * scale[:, at] for product, scale in zip(products, self.scales, strict=True)]


Body = Callable[[Tile], None]


class RowOperand(NamedTuple):
    """An operand [P, *]. cut: whether it is split into column blocks like the results."""

    array: Array
    cut: bool = False


class RowResult(NamedTuple):
    """A result [P, width], split into column blocks if it is as wide as the weights."""

    width: int
    dtype: jnp.dtype


class Product(NamedTuple):
    """The product that a body computes. name: in profiles and plans. depth: the contracted size."""

    name: str
    weight_axis: int  # along which column blocks split the weights
    depth: int


def over_rows(
    body: Body,
    product: Product,
    sizes_E: Array,
    rows: Sequence[RowOperand],
    weights: Sequence[Weight],
    results: Sequence[RowResult],
    tiles: Tiles | None,
) -> list[Array]:
    """Runs the body on every tile and returns the results [P, width].

    weights: [E, *, *]. All or none are quantized, with scales [E, 1, *], and weight_axis is then 2. A result of LANES
    columns gets LANES columns from each column block. Rows after the sum of sizes_E are neither read nor written; those
    of the results are undefined.
    """
    scales = [w.scale for w in weights if isinstance(w, Quantized)]
    assert not scales or (len(scales) == len(weights) and product.weight_axis == 2)
    values = [w.values if isinstance(w, Quantized) else w for w in weights]
    given, columns = rows[0].array.shape[0], values[0].shape[product.weight_axis]
    pairs = round_up(given)
    if pairs != given:
        rows = [r._replace(array=jnp.pad(r.array, ((0, pairs - given), (0, 0)))) for r in rows]
    tiles = tiles or _fit(product, pairs, columns, rows, values, results)
    width = tiles.width(columns)
    a, b, c = len(rows), len(values), len(results)

    def kernel(sizes_E: Ref, *refs: Ref) -> None:
        resident, refs = refs[: len(scales)] or [None] * b, refs[len(scales) :]
        hbm, refs, fields = refs[: a + b + c], refs[a + b + c :], len(TilePlan._fields)
        plan, refs = TilePlan(*refs[:fields]), refs[fields:]
        vmem, carries, semaphores = refs[: a + b + c], refs[a + b + c : -1], refs[-1]
        lay_out(plan, sizes_E, pairs, tiles)
        copied = [(h, v, semaphores.at[i]) for i, (h, v) in enumerate(zip(hbm, vmem, strict=True))]
        streams = Streams(
            [RowStream(*x) for x in copied[:a]],
            [WeightStream(*x, scale) for x, scale in zip(copied[a : a + b], resident, strict=True)],
            [RowStream(*x) for x in copied[a + b :]],
            carries,
        )
        _pipeline(body, plan, streams, tiles, columns)

    weight_shapes = [(width, w.shape[2]) if product.weight_axis == 1 else (w.shape[1], width) for w in values]
    result_widths = [width if r.width == columns else r.width for r in results]
    anywhere, arrays = pl.BlockSpec(memory_space=pl.ANY), [r.array for r in rows]
    shapes = [jax.ShapeDtypeStruct((pairs, n if n == columns else n * tiles.blocks), dtype) for n, dtype in results]
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.blocks,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(scales) + [anywhere] * (a + b),
            out_specs=[anywhere] * c,
            scratch_shapes=[
                *TilePlan.scratch(sizes_E.shape[0], pairs, tiles),
                *(pltpu.VMEM((2, tiles.rows, width if r.cut else r.array.shape[1]), r.array.dtype) for r in rows),
                *(pltpu.VMEM((2, *shape), w.dtype) for shape, w in zip(weight_shapes, values, strict=True)),
                *(pltpu.VMEM((2, tiles.rows, n), r.dtype) for n, r in zip(result_widths, results, strict=True)),
                *(pltpu.VMEM((ALIGN, n), r.dtype) for n, r in zip(result_widths, results, strict=True)),
                pltpu.SemaphoreType.DMA((a + b + c, 2)),
            ],
        ),
        out_shape=shapes,
        compiler_params=compiler_params(),
        cost_estimate=cost_estimate(2 * pairs * sum(w[0].size for w in values), [*scales, *arrays, *values, *shapes]),
        name=product.name,
    )(sizes_E, *scales, *arrays, *values)
    return [r[:given] for r in made] if pairs != given else made


def _fit(
    product: Product,
    pairs: int,
    columns: int,
    rows: Sequence[RowOperand],
    weights: Sequence[Array],
    results: Sequence[RowResult],
) -> Tiles:
    uncut = sum(r.array.shape[1] * r.array.dtype.itemsize for r in rows if not r.cut)
    cut = sum(r.array.dtype.itemsize for r in rows if r.cut) + sum(jnp.dtype(r.dtype).itemsize for r in results)
    size = sum(w.size // (w.shape[0] * columns) * w.dtype.itemsize for w in weights)
    # Weights in 8 bits are for generation, with small groups. Their DMAs are half as long and no longer hide the MXU's
    # time for the rows that pad a tile, so tiles are rounded up less.
    step = 32 if weights[0].dtype.itemsize == 1 else 64
    return fit(pairs, columns, product.depth, uncut=uncut, cut=cut, weights=size, step=step)


def _pipeline(body: Body, s: TilePlan, streams: Streams, tiles: Tiles, columns: int) -> None:
    """Runs all tiles of one column block, while the next tile's rows and the next group's weights arrive."""
    block, count = pl.program_id(0), s.totals_2[0]
    pieces = PIECES * ALIGN // max(stream.align for stream in streams.weights)

    def load(i: Array, act: Act) -> None:
        for stream in streams.rows:
            stream.copy(act, i % 2, s.row_I[i], round_up(s.count_I[i]), block)

    def store(i: Array, act: Act) -> None:
        # The next group writes a row block that it shares (see `carry`), so no row is written twice.
        written = jnp.where(i == count - 1, round_up(s.count_I[i]), s.count_I[i] & -ALIGN)
        for stream in streams.results:
            stream.copy(act, i % 2, s.row_I[i], written, block, out=True)

    def fetch(number: Array, low: Array, high: Array) -> None:
        """Starts the DMAs of pieces low to high of a group's weights.

        number: the index of the group among those with tiles.
        """

        def piece(p: Array, _: None) -> None:
            for stream in streams.weights:
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
            for stream in streams.weights:
                stream.copy(wait, number % 2, s.group_J[number], block, 0, stream.vmem.shape[1])

        @pl.when(number + 1 < s.totals_2[1])
        def _() -> None:
            low, high = (divide(pieces * (s.index_I[i] + n), s.tiles_J[number], pieces) for n in (0, 1))
            fetch(number + 1, low, high)

        load(i, wait)

        @pl.when(i > 1)
        def _() -> None:
            store(i - 2, wait)

        _multiply(body, s, i, block, streams, tiles, columns)
        for stream, kept in zip(streams.results, streams.carries, strict=True):
            carry(stream.vmem.at[i % 2], kept, s.skip_I[i], s.count_I[i])
        store(i, start)

    lax.fori_loop(0, count, tile, None)
    for last in (2, 1):

        @pl.when(count >= last)
        def _(last: int = last) -> None:
            store(count - last, wait)


def _multiply(body: Body, s: TilePlan, i: Array, block: Array, streams: Streams, tiles: Tiles, columns: int) -> None:
    """Runs the body on tile i. Each height has its own compiled body; the lowest one that is enough runs."""
    slot, buffer = i % 2, s.number_I[i] % 2
    width = tiles.width(columns)
    repeated = block * width - offset(block, columns, width)
    scales = [
        w.scale.at[s.group_J[s.number_I[i]], :, pl.ds(offset(block, columns, width), width)]
        for w in streams.weights
        if w.scale is not None
    ]
    for height in range(tiles.step, tiles.rows + 1, tiles.step):

        @pl.when((s.count_I[i] > height - tiles.step) & (s.count_I[i] <= height))
        def _(height: int = height) -> None:
            operands, made = ([r.vmem.at[slot, pl.ds(0, height)] for r in x] for x in (streams.rows, streams.results))
            body(
                Tile(
                    height, tiles.chunk, repeated, operands, [w.vmem.at[buffer] for w in streams.weights], scales, made
                )
            )


def carry(tile: Ref, kept: Ref, skip: Array, count: Array) -> None:
    """Copies the rows of the group before from `kept` to the tile's head, and keeps the rows after its last ALIGN."""

    @pl.when(skip > 0)
    def _() -> None:
        row = lax.broadcasted_iota(jnp.int32, kept.shape, 0)
        tile[pl.ds(0, ALIGN)] = jnp.where(row < skip, kept[...], tile[pl.ds(0, ALIGN)])

    @pl.when(count % ALIGN > 0)
    def _() -> None:
        kept[...] = tile[pl.ds(pl.multiple_of(count & -ALIGN, ALIGN), ALIGN)]


def round_up(count: Number) -> Number:
    """Rounds up to a multiple of ALIGN."""
    return (count + ALIGN - 1) & -ALIGN


def compiler_params() -> pltpu.CompilerParams:
    """Nearly all of the chip's VMEM; the cores of a megacore split the column blocks."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",),
        vmem_limit_bytes=chip().vmem_capacity_bytes - 2 * MIB,
        disable_bounds_checks=True,  # 2% of the time of a kernel with many small DMAs; interpret mode checks them
        disable_semaphore_checks=True,
    )
