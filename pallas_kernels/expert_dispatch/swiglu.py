"""The experts' SwiGLU fused with grouped products: gate, up and their product in one kernel, and their gradients.

Letters: P rows, E groups, D model, F expert width.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.common import LANES
from pallas_kernels.expert_dispatch.grouped_matmul import dot, over_columns
from pallas_kernels.expert_dispatch.row_pipeline import Product, RowOperand, RowResult, Tile, over_rows
from pallas_kernels.expert_dispatch.tiles import Tiles
from pallas_kernels.quantized import Weight


def gate_up(
    x_PD: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    gates_P: Array,
    group_sizes_E: Array,
    keep: bool = False,
    *,
    tiles: Tiles | None = None,
) -> list[Array]:
    """[hidden_PF], hidden[p] = gates[p] * silu(x[p] @ w_gate[e]) * (x[p] @ w_up[e]) for each row p of group e.

    gates are float32, results in x's dtype, all arithmetic is in float32. keep: return [hidden_PF, gate_PF, up_PF];
    `hidden_gradient` needs the two products. Both weights may be quantized, with scales [E, 1, F], which multiply the
    products. Rows after the sum of the group sizes are not read, and are undefined in the results.
    """

    def body(tile: Tile) -> None:
        (x, gates), (w_gate, w_up) = tile.rows, tile.weights

        def columns(at: slice | pl.Slice, size: int) -> None:
            # A single product fills an MXU of 256 columns even if widths are odd multiples of 128.
            both = dot(x[...], jnp.concatenate([w_gate[:, at], w_up[:, at]], axis=1))
            gate, up = tile.scaled((both[:, :size], both[:, size:]), at)
            hidden = jax.nn.silu(gate) * up * _wide(gates[...], size)
            for result, value in zip(tile.results, (hidden, gate, up), strict=False):
                result[:, at] = value.astype(result.dtype)

        over_columns(w_gate.shape[1], max(tile.chunk // 2 & -LANES, LANES), columns)

    return over_rows(
        body,
        Product("gate_up", weight_axis=2, depth=x_PD.shape[1]),
        group_sizes_E,
        [RowOperand(x_PD), RowOperand(_as_columns(gates_P))],
        [w_gate_EDF, w_up_EDF],
        [RowResult(w_gate_EDF.shape[2], x_PD.dtype)] * (3 if keep else 1),
        tiles,
    )


def hidden_gradient(
    g_PD: Array,
    w_down_EFD: Array,
    gate_PF: Array,
    up_PF: Array,
    gates_P: Array,
    group_sizes_E: Array,
    *,
    tiles: Tiles | None = None,
) -> tuple[Array, Array, Array, Array]:
    """(d gate_PF, d up_PF, hidden_PF, d gates_P) from the gradient g of hidden @ w_down; see `gate_up` for the names.

    The gradient of w_down needs hidden, so the kernel computes it again from its factors. d gates is float32, the
    others are in g's dtype. Rows after the sum of the group sizes are not read, and are undefined in the results.
    """

    def body(tile: Tile) -> None:
        (g, gate, up, gates), (w_down,) = tile.rows, tile.weights
        d_gate, d_up, hidden, d_gates = tile.results
        d_gates[...] = jnp.zeros((tile.height, LANES), jnp.float32)

        def columns(at: slice | pl.Slice, size: int) -> None:
            d_hidden = dot(g[...], w_down[at], (1, 1))
            a, u = gate[:, at].astype(jnp.float32), up[:, at].astype(jnp.float32)
            sigmoid, factor = jax.nn.sigmoid(a), _wide(gates[...], size)
            silu = a * sigmoid
            product = silu * u
            for i in range(0, size, LANES):
                part = (product * d_hidden)[:, i : i + LANES]
                d_gates[...] += jnp.where(at.start + i < tile.repeated, 0, part)
            d_hidden *= factor
            d_gate[:, at] = (d_hidden * u * (sigmoid + silu * (1 - sigmoid))).astype(d_gate.dtype)
            d_up[:, at] = (d_hidden * silu).astype(d_up.dtype)
            hidden[:, at] = (product * factor).astype(hidden.dtype)

        over_columns(hidden.shape[1], tile.chunk, columns)

    result = RowResult(w_down_EFD.shape[1], g_PD.dtype)
    d_gate_PF, d_up_PF, hidden_PF, d_gates_PL = over_rows(
        body,
        Product("hidden_gradient", weight_axis=1, depth=g_PD.shape[1]),
        group_sizes_E,
        [RowOperand(g_PD), RowOperand(gate_PF, True), RowOperand(up_PF, True), RowOperand(_as_columns(gates_P))],
        [w_down_EFD],
        [result, result, result, RowResult(LANES, jnp.dtype(jnp.float32))],
        tiles,
    )
    return d_gate_PF, d_up_PF, hidden_PF, d_gates_PL.sum(axis=1)


def _as_columns(gates_P: Array) -> Array:
    """Each row's number as LANES equal columns, so that it is in the same register row as the row's other columns."""
    return jnp.broadcast_to(gates_P.astype(jnp.float32)[:, None], (gates_P.shape[0], LANES))


def _wide(x_SL: Array, width: int) -> Array:
    """[rows, LANES] repeated to [rows, width]. This moves no data, as width is a multiple of LANES."""
    return jnp.concatenate([x_SL] * (width // LANES), axis=1)
