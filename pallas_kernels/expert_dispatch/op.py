"""The op of this folder: the experts' SwiGLU over (token, expert) pairs, forward and backward (section 2.2.1).

Pairs are sorted by expert, once; token rows are gathered into that order and results gathered back out of it, in
both passes, because scattering rows is dearer. Letters: N tokens, K active experts, P kept pairs; the rest as in
dsv2_jax/model/parameters.py.
"""

import functools
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.expert_dispatch import kernels, reference
from pallas_kernels.expert_dispatch.tiles import ALIGN, LANES
from pallas_kernels.quantized import Quantized, Weight

Implementation = Literal["pallas", "xla"]


class Order(NamedTuple):
    """Where pairs lie when sorted by expert; rows behind the kept pairs belong to no expert."""

    token_P: Array  # the token of each row
    pair_P: Array  # its pair, n K + k
    row_NK: Array  # the row of each pair; of a dropped pair, any row
    kept_NK: Array
    sizes_E: Array


def sort(experts_NK: Array, experts: int, rows: int) -> Order:
    """Sorts pairs by expert. At most `rows` are kept, and none whose id is `experts` or more."""
    ids_P = experts_NK.reshape(-1)
    order_P = jnp.argsort(ids_P, stable=True).astype(jnp.int32)
    row_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(ids_P.size, dtype=jnp.int32), unique_indices=True)
    ends_E = jnp.searchsorted(ids_P[order_P], jnp.arange(experts), side="right").astype(jnp.int32)
    ends_E = jnp.minimum(ends_E, rows)
    height = -(-rows // ALIGN) * ALIGN
    pair_P = jnp.pad(order_P[:rows], (0, height - min(rows, ids_P.size)))
    return Order(
        pair_P // experts_NK.shape[1],
        pair_P,
        jnp.minimum(row_P, height - 1).reshape(experts_NK.shape),
        (row_P < ends_E[-1]).reshape(experts_NK.shape),
        jnp.diff(ends_E, prepend=0),
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
    implementation: Implementation,
) -> Array:
    """y[n] = sum over k of gates[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = experts[n, k] (section 2.2.1).

    x and the weights in the compute dtype, experts int32, gates float32; the result in x's dtype, sums in float32.
    An expert id of E drops its pair: no cost, no contribution, a zero gradient for its gate. rows: a static bound on
    the number of kept pairs, where it is known to be below N K; pairs beyond it, those of the last experts, would be
    dropped. The kernels take widths that are multiples of 128, so others are padded, at the price of a copy of the
    weights.

    All three weights may be `Quantized`, with scales [E, 1, F], [E, 1, F] and [E, 1, D] (section 3.2.3): they are read
    in 8 bits, and the scales multiply the float32 sums. That has no gradient. Raises ValueError for an implementation
    that is not known, and for the gradient with quantized weights.
    """
    if implementation not in ("pallas", "xla"):
        raise ValueError(f'no implementation {implementation!r}: there are "pallas" and "xla"')
    depth, rows = x_ND.shape[1], experts_NK.size if rows is None else min(rows, experts_NK.size)
    if implementation == "pallas":
        x_ND = _pad(x_ND, 1)
        w_gate_EDF, w_up_EDF, w_down_EFD = (
            Quantized(_pad(w.values, 1), _pad(w.scale, 2)) if isinstance(w, Quantized) else _pad(w, 1)
            for w in (w_gate_EDF, w_up_EDF, w_down_EFD)
        )
    y_ND: Any = _swiglu(implementation, rows, x_ND, experts_NK, gates_NK, w_gate_EDF, w_up_EDF, w_down_EFD)
    return y_ND[:, :depth]


def _pad(x: Array, first: int) -> Array:
    """x with zeros up to multiples of LANES behind its dimensions from the `first` on."""
    widths = [(0, 0 if i < first else -n % LANES) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(n for _, n in widths) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(
    implementation: Implementation,
    rows: int,
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
) -> Array:
    ops, order = _ops(implementation), sort(experts_NK, w_gate_EDF.shape[0], rows)
    x_PD, gates_P = _take(x_ND, order.token_P), _take(gates_NK.reshape(-1), order.pair_P)
    (hidden_PF,) = ops.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, order.sizes_E)
    return ops.combine(ops.gmm(hidden_PF, w_down_EFD, order.sizes_E), order.row_NK, order.kept_NK)


def _forward(
    implementation: Implementation,
    rows: int,
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    w_gate_EDF: Weight,
    w_up_EDF: Weight,
    w_down_EFD: Weight,
) -> tuple[Array, tuple]:
    if any(isinstance(w, Quantized) for w in (w_gate_EDF, w_up_EDF, w_down_EFD)):
        raise ValueError("quantized weights are for generation: grouped_swiglu has no gradient with them")
    ops, order = _ops(implementation), sort(experts_NK, w_gate_EDF.shape[0], rows)
    x_PD, gates_P = _take(x_ND, order.token_P), _take(gates_NK.reshape(-1), order.pair_P)
    hidden_PF, gate_PF, up_PF = ops.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, order.sizes_E, keep=True)
    y_ND = ops.combine(ops.gmm(hidden_PF, w_down_EFD, order.sizes_E), order.row_NK, order.kept_NK)
    return y_ND, (x_ND, gates_P, w_gate_EDF, w_up_EDF, w_down_EFD, order, gate_PF, up_PF)


def _backward(implementation: Implementation, _rows: int, kept: tuple, g_ND: Array) -> tuple[Array | None, ...]:
    x_ND, gates_P, w_gate_EDF, w_up_EDF, w_down_EFD, order, gate_PF, up_PF = kept
    ops, sizes_E = _ops(implementation), order.sizes_E
    x_PD, g_PD = _take(x_ND, order.token_P), _take(g_ND, order.token_P)
    d_gate_PF, d_up_PF, hidden_PF, d_gates_P = ops.hidden_gradient(g_PD, w_down_EFD, gate_PF, up_PF, gates_P, sizes_E)
    dx_PD = ops.gmm_sum((d_gate_PF, d_up_PF), (w_gate_EDF, w_up_EDF), sizes_E, transpose_rhs=True)
    dw_gate_EDF, dw_up_EDF = ops.tgmm_each(x_PD, (d_gate_PF, d_up_PF), sizes_E)
    dw_down_EFD = ops.tgmm(hidden_PF, g_PD, sizes_E)
    d_gates_NK = jnp.where(order.kept_NK, _take(d_gates_P, order.row_NK), 0)
    dx_ND = ops.combine(dx_PD, order.row_NK, order.kept_NK)
    return dx_ND, None, d_gates_NK, dw_gate_EDF, dw_up_EDF, dw_down_EFD


_swiglu.defvjp(_forward, _backward)


def _ops(implementation: Implementation) -> ModuleType:
    return kernels if implementation == "pallas" else reference


def _take(x: Array, at: Array) -> Array:
    """x[at] along the first dimension, without the passes over indices that are out of bounds: none is."""
    return x.at[at].get(mode="promise_in_bounds")
