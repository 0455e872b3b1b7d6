"""The experts' SwiGLU over (token, expert) pairs, forward and backward (section 2.2.1).

Pairs are sorted by expert once. Both passes gather token rows into that order and gather results back, because a
scatter of rows costs more. A device can receive several times the pairs that a balanced router sends, and without
dropping no pair may be lost. Buffers nevertheless hold only `buffer_size` pairs: a loop computes further pairs in
further chunks, and usually there are none.

Letters: N tokens, K active experts, A sorted pairs with padding, P pairs of a chunk, E experts, D model, F expert
width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.common import LANES
from pallas_kernels.expert_dispatch import kernels
from pallas_kernels.expert_dispatch.tiles import ALIGN
from pallas_kernels.quantized import Quantized, Weight

ExpertWeights = tuple[Weight, Weight, Weight]  # w_gate [E, D, F], w_up [E, D, F], w_down [E, F, D]


class PairLimits(NamedTuple):
    """Static sizes: the maximum number of kept pairs, and the pairs of a chunk, a multiple of ALIGN."""

    max_pairs: int
    buffer_size: int


class PairOrder(NamedTuple):
    """Pairs sorted by expert, and padding."""

    pair_A: Array  # the pair of each row, n K + k
    row_NK: Array  # the row of each pair
    ends_E: Array  # the row after each expert's last


class PairChunk(NamedTuple):
    """The pairs of a chunk: P rows of a PairOrder."""

    token_P: Array  # the token of each row
    pair_P: Array
    row_NK: Array  # the row of each pair; any row for a pair that is dropped or in another chunk
    kept_NK: Array
    sizes_E: Array


def sort(experts_NK: Array, experts: int, limits: PairLimits) -> PairOrder:
    """Sorts pairs by expert. Keeps the first `max_pairs`, and no pair whose id is `experts` or more."""
    ids_A, (kept, size) = experts_NK.reshape(-1), limits
    order_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    row_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(ids_A.size, dtype=jnp.int32), unique_indices=True)
    ends_E = jnp.searchsorted(ids_A[order_A], jnp.arange(experts), side="right").astype(jnp.int32)
    padding = -(-kept // size) * size - min(kept, ids_A.size)
    return PairOrder(jnp.pad(order_A[:kept], (0, padding)), row_A.reshape(experts_NK.shape), jnp.minimum(ends_E, kept))


def take_chunk(order: PairOrder, number: Array | int, size: int) -> PairChunk:
    """Rows number * size to (number + 1) * size."""
    first = number * size
    pair_P = lax.dynamic_slice_in_dim(order.pair_A, first, size)
    row_NK = order.row_NK - first
    return PairChunk(
        pair_P // order.row_NK.shape[1],
        pair_P,
        jnp.clip(row_NK, 0, size - 1),
        (row_NK >= 0) & (row_NK < jnp.minimum(order.ends_E[-1] - first, size)),
        jnp.diff(jnp.clip(order.ends_E - first, 0, size), prepend=0),
    )


def grouped_swiglu(
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    weights: ExpertWeights,
    *,
    max_pairs: int | None = None,
    buffer_size: int | None = None,
) -> Array:
    """y[n] = sum over k of gates[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = experts[n, k] (section 2.2.1).

    x and the weights are in the compute dtype, experts int32, gates float32; the result is in x's dtype, sums are in
    float32. An expert id of E drops its pair: no cost, no contribution, a zero gradient for its gate. max_pairs: a
    static bound on the kept pairs, if one below N K is known. Pairs beyond it, those of the last experts, are dropped.
    buffer_size: pairs computed at a time, by default all. Memory grows with it; each further chunk reads the weights
    again and rounds the sums once more. The kernels need widths that are multiples of 128. Other widths are padded,
    which copies the weights.

    All three weights may be `Quantized`, with scales [E, 1, F], [E, 1, F] and [E, 1, D] (section 3.2.3). The kernels
    then read 8 bits per weight and multiply the float32 sums by the scales. Quantized weights have no gradient:
    differentiating raises ValueError.
    """
    depth, kept = x_ND.shape[1], experts_NK.size if max_pairs is None else min(max_pairs, experts_NK.size)
    limits = PairLimits(kept, -(-min(buffer_size or kept, kept) // ALIGN) * ALIGN)
    x_ND = _pad(x_ND, 1)
    w_gate_EDF, w_up_EDF, w_down_EFD = (
        Quantized(_pad(w.values, 1), _pad(w.scale, 2)) if isinstance(w, Quantized) else _pad(w, 1) for w in weights
    )
    y_ND: Any = _swiglu(limits, x_ND, experts_NK, gates_NK, (w_gate_EDF, w_up_EDF, w_down_EFD))
    return y_ND[:, :depth]


def _pad(x: Array, first: int) -> Array:
    """x with its dimensions from `first` on padded with zeros to multiples of LANES."""
    widths = [(0, 0 if i < first else -n % LANES) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(n for _, n in widths) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(limits: PairLimits, x_ND: Array, experts_NK: Array, gates_NK: Array, weights: ExpertWeights) -> Array:
    return _all_chunks(limits, x_ND, experts_NK, gates_NK, weights)[0]


def _all_chunks(
    limits: PairLimits, x_ND: Array, experts_NK: Array, gates_NK: Array, weights: ExpertWeights, keep: bool = False
) -> tuple[Array, PairOrder, list[Array]]:
    """y_ND, the order of the pairs, and with `keep` the products gate_PF and up_PF of chunk 0."""
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    order = sort(experts_NK, w_gate_EDF.shape[0], limits)

    def chunk(number: Array | int, keep: bool) -> list[Array]:
        at = take_chunk(order, number, limits.buffer_size)
        x_PD, gates_P = _take(x_ND, at.token_P), _take(gates_NK.reshape(-1), at.pair_P)
        hidden_PF, *products = kernels.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, at.sizes_E, keep)
        return [kernels.combine(kernels.gmm(hidden_PF, w_down_EFD, at.sizes_E), at.row_NK, at.kept_NK), *products]

    y_ND, *products = chunk(0, keep)
    return _add_chunks(y_ND, lambda number: chunk(number, False)[0], order, limits), order, products


def _forward(
    limits: PairLimits, x_ND: Array, experts_NK: Array, gates_NK: Array, weights: ExpertWeights
) -> tuple[Array, tuple]:
    if any(isinstance(w, Quantized) for w in weights):
        raise ValueError("grouped_swiglu has no gradient with quantized weights: they are for generation")
    y_ND, order, (gate_PF, up_PF) = _all_chunks(limits, x_ND, experts_NK, gates_NK, weights, keep=True)
    return y_ND, (x_ND, gates_NK, weights, order, gate_PF, up_PF)


def _backward(limits: PairLimits, kept: tuple, g_ND: Array) -> tuple:
    x_ND, gates_NK, (w_gate_EDF, w_up_EDF, w_down_EFD), order, gate_PF, up_PF = kept

    def chunk(number: Array | int, products: tuple[Array, Array] | None = None) -> tuple[Array, ...]:
        at = take_chunk(order, number, limits.buffer_size)
        x_PD, g_PD, gates_P = _take(x_ND, at.token_P), _take(g_ND, at.token_P), _take(gates_NK.reshape(-1), at.pair_P)
        # The forward pass keeps the products of chunk 0. Further chunks are rare and compute theirs again.
        gate_PF, up_PF = products or kernels.gate_up(x_PD, w_gate_EDF, w_up_EDF, gates_P, at.sizes_E, keep=True)[1:]
        d_gate_PF, d_up_PF, hidden_PF, d_gates_P = kernels.hidden_gradient(
            g_PD, w_down_EFD, gate_PF, up_PF, gates_P, at.sizes_E
        )
        dx_PD = kernels.gmm_sum((d_gate_PF, d_up_PF), (w_gate_EDF, w_up_EDF), at.sizes_E, transpose_rhs=True)
        dw_gate_EDF, dw_up_EDF = kernels.tgmm_each(x_PD, (d_gate_PF, d_up_PF), at.sizes_E)
        dw_down_EFD = kernels.tgmm(hidden_PF, g_PD, at.sizes_E)
        d_gates_NK = jnp.where(at.kept_NK, _take(d_gates_P, at.row_NK), 0)
        return kernels.combine(dx_PD, at.row_NK, at.kept_NK), d_gates_NK, dw_gate_EDF, dw_up_EDF, dw_down_EFD

    dx_ND, d_gates_NK, *d_weights = _add_chunks(chunk(0, (gate_PF, up_PF)), chunk, order, limits)
    return dx_ND, None, d_gates_NK, tuple(d_weights)


_swiglu.defvjp(_forward, _backward)


def _add_chunks(first: Any, chunk: Callable[[Array], Any], order: PairOrder, limits: PairLimits) -> Any:
    """The sum of all chunks. first: the result of chunk 0, which is the sum if the buffer holds all pairs."""
    kept, size = limits
    if kept <= size:
        return first
    chunks = (order.ends_E[-1] + size - 1) // size
    return lax.fori_loop(1, chunks, lambda i, total: jax.tree.map(jnp.add, total, chunk(i)), first)


def _take(x: Array, at: Array) -> Array:
    """x[at] along the first dimension. All indices are in bounds, so XLA needs no checks."""
    return x.at[at].get(mode="promise_in_bounds")
