"""Grouped matrix products: every group of rows times its own matrix, and the gradient for the rows.

Groups of rows follow each other from row 0. Letters: P rows, E groups, D contracted, F result.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common import LANES
from pallas_kernels.expert_dispatch.row_pipeline import Product, RowOperand, RowResult, Tile, over_rows
from pallas_kernels.expert_dispatch.tiles import Tiles
from pallas_kernels.quantized import Weight


def gmm(
    lhs_PD: Array,
    rhs_EDF: Weight,
    group_sizes_E: Array,
    transpose_rhs: bool = False,
    *,
    tiles: Tiles | None = None,
) -> Array:
    """lhs[p] @ rhs[e] for each row p of group e: [P, F] in lhs's dtype, sums in float32.

    A quantized rhs has scales [E, 1, F], which multiply the sums; its values become lhs's dtype in VMEM.
    transpose_rhs: rhs is [E, F, D], and not quantized. Rows after the sum of the group sizes are not read, and are
    undefined in the result.
    """
    return gmm_sum((lhs_PD,), (rhs_EDF,), group_sizes_E, transpose_rhs, tiles=tiles)


def gmm_sum(
    lhs: Sequence[Array],
    rhs: Sequence[Weight],
    group_sizes_E: Array,
    transpose_rhs: bool = False,
    *,
    tiles: Tiles | None = None,
) -> Array:
    """The sum of gmm(lhs[i], rhs[i]), added up in float32 and written once."""
    axis = 1 if transpose_rhs else 2

    def body(tile: Tile) -> None:
        (result,) = tile.results

        def columns(at: slice | pl.Slice, _: int) -> None:
            xs, ws = [x[...] for x in tile.rows], [w[at] if transpose_rhs else w[:, at] for w in tile.weights]
            if result.dtype == jnp.bfloat16 and not tile.scales:
                # A single product fills an MXU of 256 rows even if depths are odd multiples of 128.
                xs, ws = [jnp.concatenate(xs, axis=1)], [jnp.concatenate(ws, axis=2 - axis)]
            products = tile.scaled([dot(x, w, (1, 2 - axis)) for x, w in zip(xs, ws, strict=True)], at)
            result[:, at] = sum(products[1:], start=products[0]).astype(result.dtype)

        over_columns(result.shape[1], tile.chunk, columns)

    product = Product("gmm", weight_axis=axis, depth=sum(x.shape[1] for x in lhs))
    result = RowResult(rhs[0].shape[axis], lhs[0].dtype)
    (result_PF,) = over_rows(body, product, group_sizes_E, [RowOperand(x) for x in lhs], rhs, [result], tiles)
    return result_PF


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product over dimensions `contract` of a and b, in float32; float32 operands are not rounded.

    A b in 8 bits is not rounded either: the MXU widens float8 itself, and this function converts int8 to a's dtype.
    Float32 operands are multiplied LANES deep at a time, because one long chain of float32 sums rounds twice as much.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype == jnp.float32 or b.dtype == jnp.int8:
        b = b.astype(a.dtype)
    if a.dtype != jnp.float32:
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    parts = [
        lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST)
        for x, y in zip(_parts(a, contract[0]), _parts(b, contract[1]), strict=True)
    ]
    return sum(parts[1:], start=parts[0])


def _parts(x: Array, axis: int) -> list[Array]:
    """x split along the axis into parts of LANES."""
    size = x.shape[axis]
    return [lax.slice_in_dim(x, i, min(i + LANES, size), axis=axis) for i in range(0, size, LANES)]


def over_columns(width: int, chunk: int, body: Callable[[slice | pl.Slice, int], None]) -> None:
    """Calls body(slice, its size) for each chunk of columns, then for the remaining columns."""

    def step(i: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(i * chunk, LANES), chunk), chunk)

    if width >= chunk:
        lax.fori_loop(0, width // chunk, step, None)
    if width % chunk:
        body(pl.ds(width // chunk * chunk, width % chunk), width % chunk)
