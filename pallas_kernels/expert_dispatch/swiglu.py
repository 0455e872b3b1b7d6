"""The experts' SwiGLU around the grouped products: gate, up and their product in one pass, and the way back.

Letters: P rows, E groups, D model, F expert width.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.constants import LANES
from pallas_kernels.expert_dispatch.grouped_matmul import dot, over_columns
from pallas_kernels.expert_dispatch.row_pipeline import Tile, over_rows
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

    gates float32; results in x's dtype, all arithmetic in float32. keep: [hidden_PF, gate_PF, up_PF], the two products
    as well, which `hidden_gradient` needs. Quantized weights: both, with scales [E, 1, F], which multiply the products.
    Rows behind the sum of the group sizes are not read, and undefined.
    """

    def body(tile: Tile) -> None:
        (x, gates), (w_gate, w_up) = tile.rows, tile.weights

        def columns(at: slice | pl.Slice, size: int) -> None:
            # One product, so that widths that are odd multiples of 128 still fill an MXU of 256 columns.
            both = dot(x[...], jnp.concatenate([w_gate[:, at], w_up[:, at]], axis=1))
            gate, up = tile.scaled((both[:, :size], both[:, size:]), at)
            hidden = jax.nn.silu(gate) * up * _wide(gates[...], size)
            for result, value in zip(tile.results, (hidden, gate, up), strict=False):
                result[:, at] = value.astype(result.dtype)

        over_columns(w_gate.shape[1], max(tile.chunk // 2 & -LANES, LANES), columns)

    width = w_gate_EDF.shape[2]
    return over_rows(
        body,
        group_sizes_E,
        [x_PD, lanes(gates_P)],
        [w_gate_EDF, w_up_EDF],
        [(width, x_PD.dtype)] * (3 if keep else 1),
        weight_axis=2,
        depth=x_PD.shape[1],
        split=[False, False],
        name="gate_up",
        tiles=tiles,
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

    hidden is what the gradient of w_down needs: made again here, where its factors are at hand. d gates is float32, the
    others in g's dtype. Rows behind the sum of the group sizes are not read, and undefined.
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

    width, dtype = w_down_EFD.shape[1], g_PD.dtype
    d_gate_PF, d_up_PF, hidden_PF, d_gates_PL = over_rows(
        body,
        group_sizes_E,
        [g_PD, gate_PF, up_PF, lanes(gates_P)],
        [w_down_EFD],
        [(width, dtype)] * 3 + [(LANES, jnp.float32)],
        weight_axis=1,
        depth=g_PD.shape[1],
        split=[False, True, True, False],
        name="hidden_gradient",
        tiles=tiles,
    )
    return d_gate_PF, d_up_PF, hidden_PF, d_gates_PL.sum(axis=1)


def lanes(gates_P: Array) -> Array:
    """A number for each row as 128 equal columns: a row's numbers then lie where its other columns do."""
    return jnp.broadcast_to(gates_P.astype(jnp.float32)[:, None], (gates_P.shape[0], LANES))


def _wide(x_SL: Array, width: int) -> Array:
    """[rows, LANES] repeated to [rows, width]; without a move in registers, as width is a multiple of LANES."""
    return jnp.concatenate([x_SL] * (width // LANES), axis=1)
