"""The op of this folder: the experts' SwiGLU over (token, expert) pairs, forward and backward (section 2.2.1).

Pairs are sorted by expert, once; token rows are gathered into that order and results gathered back out of it, in
both passes, because scattering rows is dearer. A device may be sent several times the pairs that a balanced router
sends it, and without dropping none may be lost; so that buffers and gathers need not be as large as the worst case,
pairs beyond `room` are computed in further turns, in a loop that mostly has none.

Letters: N tokens, K active experts, P pairs of a turn; the rest as in dsv2_jax/parameters.py.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.expert_dispatch import kernels, reference
from pallas_kernels.expert_dispatch.tiles import ALIGN, LANES
from pallas_kernels.quantized import Quantized, Weight

Implementation = Literal["pallas", "xla"]


class Order(NamedTuple):
    """Pairs sorted by expert, A of them and padding; rows behind the kept pairs belong to no expert."""

    pair_A: Array  # the pair of each row, n K + k
    row_NK: Array  # the row of each pair
    ends_E: Array  # the row behind each expert's last


class Turn(NamedTuple):
    """Where the pairs of a turn lie: P rows of an Order."""

    token_P: Array  # the token of each row
    pair_P: Array
    row_NK: Array  # the row of each pair; of one that is dropped or not of this turn, any row
    kept_NK: Array
    sizes_E: Array


def sort(experts_NK: Array, experts: int, rows: int, room: int) -> Order:
    """Sorts pairs by expert. At most `rows` are kept, and none whose id is `experts` or more."""
    ids_A = experts_NK.reshape(-1)
    order_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    row_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(ids_A.size, dtype=jnp.int32), unique_indices=True)
    ends_E = jnp.searchsorted(ids_A[order_A], jnp.arange(experts), side="right").astype(jnp.int32)
    padding = -(-rows // room) * room - min(rows, ids_A.size)
    return Order(jnp.pad(order_A[:rows], (0, padding)), row_A.reshape(experts_NK.shape), jnp.minimum(ends_E, rows))


def take_turn(order: Order, number: Array | int, room: int) -> Turn:
    """Rows number * room to (number + 1) * room."""
    first = number * room
    pair_P = lax.dynamic_slice_in_dim(order.pair_A, first, room)
    row_NK = order.row_NK - first
    return Turn(
        pair_P // order.row_NK.shape[1],
        pair_P,
        jnp.clip(row_NK, 0, room - 1),
        (row_NK >= 0) & (row_NK < jnp.minimum(order.ends_E[-1] - first, room)),
        jnp.diff(jnp.clip(order.ends_E - first, 0, room), prepend=0),
    )


def grouped_swiglu(
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
    *,
    rows: int | None = None,
    room: int | None = None,
    implementation: Implementation,
) -> Array:
    """y[n] = sum over k of gates[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = experts[n, k] (section 2.2.1).

    x and the weights in the compute dtype, experts int32, gates float32; the result in x's dtype, sums in float32.
    An expert id of E drops its pair: no cost, no contribution, a zero gradient for its gate. rows: a static bound on
    the number of kept pairs, where it is known to be below N K; pairs beyond it, those of the last experts, would be
    dropped. room: so many pairs are computed at a time, all by default; memory grows with it, and a turn more costs
    what reading the weights costs, and rounds sums once more. The kernels take widths that are multiples of 128, so
    others are padded, at the price of a copy of the weights.

    All three weights may be `Quantized`, with scales [E, 1, F], [E, 1, F] and [E, 1, D] (section 3.2.3): they are read
    in 8 bits, and the scales multiply the float32 sums. That has no gradient. Raises ValueError for an implementation
    that is not known, and for the gradient with quantized weights.
    """
    if implementation not in ("pallas", "xla"):
        raise ValueError(f'no implementation {implementation!r}: there are "pallas" and "xla"')
    depth, rows = x_ND.shape[1], experts_NK.size if rows is None else min(rows, experts_NK.size)
    room = -(-min(room or rows, rows) // ALIGN) * ALIGN
    if implementation == "pallas":
        x_ND = _pad(x_ND, 1)
        w_gate_EDF, w_up_EDF, w_down_EFD = (
            Quantized(_pad(w.values, 1), _pad(w.scale, 2)) if isinstance(w, Quantized) else _pad(w, 1)
            for w in (w_gate_EDF, w_up_EDF, w_down_EFD)
        )
    y_ND: Any = _swiglu(implementation, rows, room, x_ND, experts_NK, gates_NK, w_gate_EDF, w_up_EDF, w_down_EFD)
    return y_ND[:, :depth]


def _pad(x: Array, first: int) -> Array:
    """x with zeros up to multiples of LANES behind its dimensions from the `first` on."""
    widths = [(0, 0 if i < first else -n % LANES) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(n for _, n in widths) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _swiglu(
    implementation: Implementation,
    rows: int,
    room: int,
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
) -> Array:
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    return _all_turns(implementation, rows, room, x_ND, experts_NK, gates_NK, weights)[0]


def _all_turns(
    implementation: Implementation,
    rows: int,
    room: int,
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    weights: tuple[Weight, Weight, Weight],
    keep: bool = False,
) -> tuple[Array, Order, list[Array]]:
    """y_ND, the order of the pairs, and with `keep` the products gate_PF and up_PF of turn 0."""
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    ops, order = _ops(implementation), sort(experts_NK, w_gate_EDF.shape[0], rows, room)

    def turn(number: Array | int, keep: bool) -> list[Array]:
        at = take_turn(order, number, room)
        x_PD, gates_P = _take(x_ND, at.token_P), _take(gates_NK.reshape(-1), at.pair_P)
        hidden_PF, *products = ops.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, at.sizes_E, keep)
        return [ops.combine(ops.gmm(hidden_PF, w_down_EFD, at.sizes_E), at.row_NK, at.kept_NK), *products]

    y_ND, *products = turn(0, keep)
    return _add_turns(y_ND, lambda number: turn(number, False)[0], order, rows, room), order, products


def _forward(
    implementation: Implementation,
    rows: int,
    room: int,
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
) -> tuple[Array, tuple]:
    if any(isinstance(w, Quantized) for w in (w_gate_EDF, w_up_EDF, w_down_EFD)):
        raise ValueError("quantized weights are for generation: grouped_swiglu has no gradient with them")
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    y_ND, order, (gate_PF, up_PF) = _all_turns(
        implementation, rows, room, x_ND, experts_NK, gates_NK, weights, keep=True
    )
    return y_ND, (x_ND, gates_NK, *weights, order, gate_PF, up_PF)


def _backward(
    implementation: Implementation, rows: int, room: int, kept: tuple, g_ND: Array
) -> tuple[Array | None, ...]:
    x_ND, gates_NK, w_gate_EDF, w_up_EDF, w_down_EFD, order, gate_PF, up_PF = kept
    ops = _ops(implementation)

    def turn(number: Array | int, products: tuple[Array, Array] | None = None) -> tuple[Array, ...]:
        at = take_turn(order, number, room)
        x_PD, g_PD, gates_P = _take(x_ND, at.token_P), _take(g_ND, at.token_P), _take(gates_NK.reshape(-1), at.pair_P)
        # Turn 0 has kept its products; the others, which are seldom, make them again.
        gate_PF, up_PF = products or ops.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, at.sizes_E, keep=True)[1:]
        d_gate_PF, d_up_PF, hidden_PF, d_gates_P = ops.hidden_gradient(
            g_PD, w_down_EFD, gate_PF, up_PF, gates_P, at.sizes_E
        )
        dx_PD = ops.gmm_sum((d_gate_PF, d_up_PF), (w_gate_EDF, w_up_EDF), at.sizes_E, transpose_rhs=True)
        dw_gate_EDF, dw_up_EDF = ops.tgmm_each(x_PD, (d_gate_PF, d_up_PF), at.sizes_E)
        dw_down_EFD = ops.tgmm(hidden_PF, g_PD, at.sizes_E)
        d_gates_NK = jnp.where(at.kept_NK, _take(d_gates_P, at.row_NK), 0)
        return ops.combine(dx_PD, at.row_NK, at.kept_NK), d_gates_NK, dw_gate_EDF, dw_up_EDF, dw_down_EFD

    dx_ND, *others = _add_turns(turn(0, (gate_PF, up_PF)), turn, order, rows, room)
    return dx_ND, None, *others


_swiglu.defvjp(_forward, _backward)


def _add_turns(first: Any, turn: Callable[[Array], Any], order: Order, rows: int, room: int) -> Any:
    """What turn 0 made and all others: `first` itself where there is room for all rows."""
    if rows <= room:
        return first
    turns = (order.ends_E[-1] + room - 1) // room
    return lax.fori_loop(1, turns, lambda i, total: jax.tree.map(jnp.add, total, turn(i)), first)


def _ops(implementation: Implementation) -> ModuleType:
    return kernels if implementation == "pallas" else reference


def _take(x: Array, at: Array) -> Array:
    """x[at] along the first dimension, without the passes over indices that are out of bounds: none is."""
    return x.at[at].get(mode="promise_in_bounds")
