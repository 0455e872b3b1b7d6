"""The experts' SwiGLU over sorted (token, expert) pairs: cost is proportional to pairs, not to experts times tokens.

Pairs are sorted by expert. A loop over the experts that have pairs runs an inner loop over as many blocks of rows as
each expert needs. On CPU without a backward pass, if most experts have rows, one batched product computes the first
rows of all experts. Letters: N tokens, K active experts, P = N K pairs, S rows of a block; the rest as in
parameters.py.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.ops.cpu import streams
from dsv2_jax.ops.cpu.matmul import from_bits, to_bits
from dsv2_jax.ops.matmul import dequantize, dot, weight_gradient
from dsv2_jax.ops.switch import on_cpu
from pallas_kernels.quantized import Quantized, Weight

_BLOCKS = (512, 128)  # rows of a block in training: large blocks first, then small ones for an expert's remainder


class _SortedPairs(NamedTuple):
    """Pairs in expert order. Dropped pairs come last and belong to no expert."""

    order_P: Array  # the pair of each sorted row; one block of padding keeps slices in bounds
    starts_E: Array  # first sorted row of each expert
    counts_E: Array
    busy_E: Array  # ids of the experts: first those that have rows, then those that have none


Weights = tuple[Weight, Weight, Weight]  # w_gate_EDF, w_up_EDF, w_down_EFD


@jax.custom_vjp
def grouped_swiglu(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: Weights) -> Array:
    """y[n] = sum over k of gates[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = experts[n, k] (section 2.2.1).

    x and the weights in the compute dtype, experts int32, gates float32; the result in x's dtype, sums in float32.
    An expert id of E drops its pair: no cost, no contribution, a zero gradient for its gate. Quantized weights are not
    differentiable.
    """
    experts = weights[0].shape[0]
    average = experts_NK.size / experts
    quantized = any(isinstance(w, Quantized) for w in weights)  # a product over all experts would dequantise all
    sizes, slots = _blocks(average), 0 if quantized else _slots(average, x_ND.dtype)
    pairs = _sort(experts_NK, experts, max(*sizes, slots))
    if not slots:
        return _run(x_ND, pairs, gates_NK, weights, sizes, keep=False)[0].astype(x_ND.dtype)

    def first() -> tuple[Array, _SortedPairs]:
        rest_E = jnp.maximum(pairs.counts_E - slots, 0)
        return _batched(x_ND, pairs, gates_NK, weights, slots), _sorted(pairs.order_P, pairs.starts_E + slots, rest_E)

    # One product over all experts reads the weights in place. The loop copies those of each expert that has rows.
    most = 4 * jnp.sum(pairs.counts_E > 0) >= 3 * experts
    y_ND, pairs = lax.cond(most, first, lambda: (jnp.zeros(x_ND.shape, jnp.float32), pairs))
    return (y_ND + _run(x_ND, pairs, gates_NK, weights, sizes, keep=False)[0]).astype(x_ND.dtype)


def _blocks(average: float) -> tuple[int, ...]:
    """Rows of a block without a backward pass, for experts with `average` rows each; as _BLOCKS.

    Float32 products reach full speed at 8 rows, and one more block costs little: the weights are in the cache.
    """
    for size in (1, 4, 8):
        if average <= size:
            return (size,)
    return (16,) if average <= 128 else (128, 16)


def _slots(average: float, dtype: jnp.dtype) -> int:
    """Rows of each expert in one batched product without a backward pass; the loop takes further rows. 0 for none.

    Only on CPU, where slicing a weight copies it. With few rows many experts have none, and with many rows the padding
    costs more than the loop.
    """
    most = 128 if dtype == jnp.bfloat16 else 32
    return 4 * round((average + math.sqrt(average)) / 4) if on_cpu() and 2 <= average <= most else 0


def _sort(experts_NK: Array, experts: int, padding: int) -> _SortedPairs:
    ids_P = experts_NK.reshape(-1)
    order_P = jnp.argsort(ids_P, stable=True).astype(jnp.int32)
    counts_E = jnp.sum(ids_P[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return _sorted(jnp.pad(order_P, (0, padding)), jnp.cumsum(counts_E) - counts_E, counts_E)


def _sorted(order_P: Array, starts_E: Array, counts_E: Array) -> _SortedPairs:
    return _SortedPairs(order_P, starts_E, counts_E, jnp.argsort(counts_E == 0, stable=True).astype(jnp.int32))


def _batched(x_ND: Array, pairs: _SortedPairs, gates_NK: Array, weights: Sequence[Weight], slots: int) -> Array:
    """The float32 contribution of the first `slots` rows of each expert, in products batched over the experts."""
    k, dtype = gates_NK.shape[1], x_ND.dtype
    w_gate_EDF, w_up_EDF, w_down_EFD = (dequantize(w, dtype) for w in weights)
    pairs_ES = pairs.order_P[pairs.starts_E[:, None] + jnp.arange(slots)]
    gates_ES = jnp.where(jnp.arange(slots) < pairs.counts_E[:, None], gates_NK.reshape(-1)[pairs_ES], 0)
    x_ESD = _rows(x_ND, pairs_ES // k)
    a_ESF, u_ESF = (_per_expert(x_ESD, w).astype(dtype).astype(jnp.float32) for w in (w_gate_EDF, w_up_EDF))
    hidden_ESF = (jax.nn.silu(a_ESF) * u_ESF * gates_ES[..., None]).astype(dtype)
    return jnp.zeros(x_ND.shape, jnp.float32).at[pairs_ES // k].add(_per_expert(hidden_ESF, w_down_EFD))


def _per_expert(x_ESD: Array, w_EDF: Array) -> Array:
    return lax.dot_general(x_ESD, w_EDF, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _expert(w: Weight, e: Array, dtype: jnp.dtype) -> Array:
    """One expert's matrix as a matmul operand."""
    if isinstance(w, Quantized):
        return dequantize(Quantized(w.values[e], w.scale[e]), dtype)
    if w.dtype == jnp.bfloat16 and on_cpu():
        w, e = lax.optimization_barrier((w, e))  # otherwise XLA converts all experts, which is a copy
    return _rows(w, e)  # pyright: ignore[reportArgumentType]


def _rows(x: Array, at: Array) -> Array:
    """x[at] along the first dimension; a bfloat16 x is not widened (see to_bits)."""
    return from_bits(to_bits(x)[at])


def _over_blocks(pairs: _SortedPairs, sizes: Sequence[int], e: Array, body: Callable, carry: tuple) -> tuple:
    """Runs body(size, row, left, carry) over the blocks of expert e. `left` rows, starting at `row`, belong to it."""
    start, count, done = pairs.starts_E[e], pairs.counts_E[e], jnp.int32(0)
    for i, size in enumerate(sizes):
        last = i == len(sizes) - 1
        blocks = (count - done + (size - 1 if last else 0)) // size

        def step(j: Array, carry: tuple, size: int = size, done: Array = done) -> tuple:
            return body(size, start + done + j * size, count - done - j * size, carry)

        carry = lax.fori_loop(0, blocks, step, carry)
        done = done + blocks * size
    return carry


def _run(
    x_ND: Array, pairs: _SortedPairs, gates_NK: Array, weights: Sequence[Weight], sizes: Sequence[int], *, keep: bool
) -> tuple[Array, list[list[Array]]]:
    """The result in float32 and, with `keep`, the gate and up products in sorted rows, one pair for each stream."""
    k, (experts, _, width) = gates_NK.shape[1], weights[0].shape
    dtype, gates_P = x_ND.dtype, gates_NK.reshape(-1)

    def expert(i: Array, carry: tuple) -> tuple:
        e = pairs.busy_E[i]
        w_gate_DF, w_up_DF, w_down_FD = (_expert(w, e, dtype) for w in weights)

        def block(size: int, row: Array, left: Array, carry: tuple) -> tuple:
            y_ND, *kept = carry
            pairs_S = lax.dynamic_slice(pairs.order_P, (row,), (size,))
            x_SD = _rows(x_ND, pairs_S // k)
            a_SF, u_SF = dot(x_SD, w_gate_DF).astype(dtype), dot(x_SD, w_up_DF).astype(dtype)
            if keep:
                new = zip(kept, (a_SF, u_SF), strict=True)
                kept = [lax.dynamic_update_slice(all_PF, to_bits(new_SF), (row, 0)) for all_PF, new_SF in new]
            a_SF, u_SF = a_SF.astype(jnp.float32), u_SF.astype(jnp.float32)
            gates_S = jnp.where(jnp.arange(size) < left, gates_P[pairs_S], 0)
            hidden_SF = (jax.nn.silu(a_SF) * u_SF * gates_S[:, None]).astype(dtype)
            return (y_ND.at[pairs_S // k].add(dot(hidden_SF, w_down_FD)), *kept)

        return _over_blocks(pairs, sizes, e, block, carry)

    kept = [to_bits(jnp.zeros((pairs.order_P.shape[0], width), dtype))] * (2 * keep)
    empty = (jnp.zeros(x_ND.shape, jnp.float32), *kept)
    busy = jnp.cumsum(pairs.counts_E > 0, dtype=jnp.int32)
    stops = [stop for _, stop in streams.ranges(experts)]
    # With `keep`, each part holds a fixed range of experts, so that the backward pass finds an expert's rows by its id.
    edges = [0, *(busy[stop - 1] if keep else busy[-1] * stop // experts for stop in stops)]
    parts = [lax.fori_loop(start, stop, expert, empty) for start, stop in itertools.pairwise(edges)]
    y_ND = functools.reduce(jnp.add, [y_ND for y_ND, *_ in parts])
    return y_ND, [kept for _, *kept in parts]


def _forward(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: Weights) -> tuple[Array, tuple]:
    pairs = _sort(experts_NK, weights[0].shape[0], max(_BLOCKS))
    y_ND, hidden = _run(x_ND, pairs, gates_NK, weights, _BLOCKS, keep=True)
    return y_ND.astype(x_ND.dtype), (x_ND, gates_NK, weights, pairs, hidden)


def _backward(kept: tuple, g_ND: Array) -> tuple:
    x_ND, gates_NK, weights, pairs, hidden = kept
    k, (experts, _, width), dtype = gates_NK.shape[1], weights[0].shape, x_ND.dtype
    gates_P = gates_NK.reshape(-1)

    def expert(e: Array, carry: tuple, first: int, a_PF: Array, u_PF: Array) -> tuple:
        dx_ND, dgates_P, *dw_E = carry
        w_gate_DF, w_up_DF, w_down_FD = (_expert(w, e, dtype) for w in weights)

        def block(size: int, row: Array, left: Array, carry: tuple) -> tuple:
            dx_ND, dgates_P, dw_gate_DF, dw_up_DF, dw_down_FD = carry
            pairs_S = lax.dynamic_slice(pairs.order_P, (row,), (size,))
            own_S = jnp.arange(size) < left
            gates_S = jnp.where(own_S, gates_P[pairs_S], 0)[:, None]
            x_SD, g_SD = _rows(x_ND, pairs_S // k), _rows(g_ND, pairs_S // k)
            a_SF = from_bits(lax.dynamic_slice(a_PF, (row, 0), (size, width))).astype(jnp.float32)
            u_SF = from_bits(lax.dynamic_slice(u_PF, (row, 0), (size, width))).astype(jnp.float32)
            sigmoid_SF = jax.nn.sigmoid(a_SF)
            silu_SF = a_SF * sigmoid_SF
            hidden_SF = silu_SF * u_SF
            dhidden_SF = dot(g_SD, w_down_FD, (1, 1))
            dgates_S = jnp.where(own_S, jnp.sum(hidden_SF * dhidden_SF, axis=1), 0)
            dhidden_SF = dhidden_SF * gates_S
            da_SF = (dhidden_SF * u_SF * (sigmoid_SF + silu_SF * (1 - sigmoid_SF))).astype(dtype)
            du_SF = (dhidden_SF * silu_SF).astype(dtype)
            dx_SD = dot(da_SF, w_gate_DF, (1, 1)) + dot(du_SF, w_up_DF, (1, 1))
            return (
                dx_ND.at[pairs_S // k].add(dx_SD),
                dgates_P.at[pairs_S].add(dgates_S),
                dw_gate_DF + weight_gradient(x_SD, da_SF),
                dw_up_DF + weight_gradient(x_SD, du_SF),
                dw_down_FD + weight_gradient((hidden_SF * gates_S).astype(dtype), g_SD),
            )

        zeros = [jnp.zeros(w.shape[1:], jnp.float32) for w in dw_E]
        dx_ND, dgates_P, *dw = _over_blocks(pairs, _BLOCKS, e, block, (dx_ND, dgates_P, *zeros))
        dw_E = [lax.dynamic_update_index_in_dim(w, new, e - first, 0) for w, new in zip(dw_E, dw, strict=True)]
        return (dx_ND, dgates_P, *dw_E)

    parts = []
    for (start, stop), (a_PF, u_PF) in zip(streams.ranges(experts), hidden, strict=True):
        # Weight gradients stay float32 here, because rounding them in the loop would take another pass.
        empty = [jnp.zeros((stop - start, *w.shape[1:]), jnp.float32) for w in weights]
        empty = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(gates_P.shape, jnp.float32), *empty)
        one = functools.partial(expert, first=start, a_PF=a_PF, u_PF=u_PF)
        parts.append(lax.fori_loop(start, stop, one, empty))
    dx, dgates, *dw = zip(*parts, strict=True)
    dx_ND, dgates_P = functools.reduce(jnp.add, dx), functools.reduce(jnp.add, dgates)
    dw_gate_EDF, dw_up_EDF, dw_down_EFD = (jnp.concatenate(part).astype(dtype) for part in dw)
    return dx_ND.astype(dtype), None, dgates_P.reshape(gates_NK.shape), (dw_gate_EDF, dw_up_EDF, dw_down_EFD)


grouped_swiglu.defvjp(_forward, _backward)
