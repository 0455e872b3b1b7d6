"""Experts' SwiGLU over sorted (token, expert) pairs: cost follows the pairs, not experts times tokens.

Pairs are sorted by expert; a loop over experts runs an inner loop over blocks of rows as often as the group needs, or,
where there is no gradient to prepare for, one loop runs over all experts' blocks, which then are of one size. Plain
XLA, exact, on any device. Letters: N tokens, K active experts, P = N K pairs, S rows of a block; the rest as in
parameters.py.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.model import streams
from dsv2_jax.model.matmul import dot, from_bits, to_bits, weight_gradient, whole
from pallas_kernels.quantized import Quantized, Weight

_BLOCKS = (512, 128)  # rows of a block: large ones first, then small ones for the rest of a group
_ENOUGH_ROWS, _MOST_ROWS = 64, 128  # from the first on a product is fast, and rows that only pad cost as the others


class _Plan(NamedTuple):
    """Pairs in expert order; dropped pairs come last and belong to no group."""

    order_P: Array  # pair at each sorted row, padded by a block so that slices stay inside
    starts_E: Array  # first sorted row of each expert
    counts_E: Array


@jax.custom_vjp
def grouped_swiglu(
    x_ND: Array, experts_NK: Array, gates_NK: Array, w_gate_EDF: Weight, w_up_EDF: Weight, w_down_EFD: Weight
) -> Array:
    """y[n] = sum over k of gates[n, k] * down_e(silu(gate_e(x[n])) * up_e(x[n])), e = experts[n, k] (section 2.2.1).

    x and the weights in the compute dtype, experts int32, gates float32; the result in x's dtype, sums in float32.
    An expert id of E drops its pair: no cost, no contribution, a zero gradient for its gate. Quantized weights have no
    gradient.
    """
    k, experts = experts_NK.shape[1], w_gate_EDF.shape[0]
    size = _rows_of_a_block(experts_NK.size / experts)
    plan = _sort(experts_NK, experts, size)
    ends_E = jnp.cumsum((plan.counts_E + size - 1) // size)

    def block(i: Array, y_ND: Array) -> Array:
        e = jnp.searchsorted(ends_E, i, side="right", method="compare_all").astype(jnp.int32)
        blocks_before = jnp.where(e > 0, ends_E[e - 1], 0)
        offset = (i - blocks_before) * size
        pairs_S = lax.dynamic_slice(plan.order_P, (plan.starts_E[e] + offset,), (size,))
        tokens_S = pairs_S // k
        gates_S = jnp.where(jnp.arange(size) + offset < plan.counts_E[e], gates_NK.reshape(-1)[pairs_S], 0)
        x_SD = _rows(x_ND, tokens_S)
        w_gate_DF, w_up_DF, w_down_FD = (_expert(w, e, x_ND.dtype) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
        hidden_SF = jax.nn.silu(dot(x_SD, w_gate_DF)) * dot(x_SD, w_up_DF) * gates_S[:, None]
        return y_ND.at[tokens_S].add(dot(hidden_SF.astype(x_ND.dtype), w_down_FD))

    edges = [0, *(ends_E[-1] * stop // experts for _, stop in streams.ranges(experts))]
    empty = jnp.zeros(x_ND.shape, jnp.float32)
    parts = [lax.fori_loop(start, stop, block, empty) for start, stop in itertools.pairwise(edges)]
    return functools.reduce(jnp.add, parts).astype(x_ND.dtype)


def _rows_of_a_block(average: float) -> int:
    """A power of two, for experts that get so many rows each.

    Each block reads its expert's weights, so that most should need one while products are bound by these: half as many
    rows again as they get.
    """
    size = 1
    while size < _MOST_ROWS and size < (1.5 if size < _ENOUGH_ROWS else 0.75) * average:
        size *= 2
    return size


def _sort(experts_NK: Array, experts: int, padding: int) -> _Plan:
    ids_P = experts_NK.reshape(-1)
    order_P = jnp.argsort(ids_P, stable=True).astype(jnp.int32)
    counts_E = jnp.sum(ids_P[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return _Plan(jnp.pad(order_P, (0, padding)), jnp.cumsum(counts_E) - counts_E, counts_E)


def _expert(w: Weight, e: Array, dtype: jnp.dtype) -> Array:
    """One expert's matrix, as a matmul operand."""
    return whole(Quantized(w.values[e], w.scale[e]), dtype) if isinstance(w, Quantized) else _rows(w, e)


def _rows(x: Array, at: Array) -> Array:
    """x[at] along the first dimension, without widening the rest of a bfloat16 x (see to_bits)."""
    return from_bits(to_bits(x)[at])


def _over_blocks(plan: _Plan, e: Array, body: Callable, carry: tuple) -> tuple:
    """Runs body(size, row, left, carry) over the blocks of expert e; `left` rows from `row` on are still its own."""
    start, count, done = plan.starts_E[e], plan.counts_E[e], jnp.int32(0)
    for i, size in enumerate(_BLOCKS):
        last = i == len(_BLOCKS) - 1
        blocks = (count - done + (size - 1 if last else 0)) // size

        def step(j: Array, carry: tuple, size: int = size, done: Array = done) -> tuple:
            return body(size, start + done + j * size, count - done - j * size, carry)

        carry = lax.fori_loop(0, blocks, step, carry)
        done = done + blocks * size
    return carry


def _forward(
    x_ND: Array, experts_NK: Array, gates_NK: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array
) -> tuple[Array, tuple]:
    """The result and what the backward pass needs: the hidden activations of every pair, in sorted rows."""
    (_, k), (experts, _, width) = experts_NK.shape, w_gate_EDF.shape
    dtype, gates_P = x_ND.dtype, gates_NK.reshape(-1)
    plan = _sort(experts_NK, experts, max(_BLOCKS))

    def expert(e: Array, carry: tuple) -> tuple:
        w_gate_DF, w_up_DF, w_down_FD = (_rows(w, e) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))

        def block(size: int, row: Array, left: Array, carry: tuple) -> tuple:
            y_ND, a_PF, u_PF = carry
            pairs_S = lax.dynamic_slice(plan.order_P, (row,), (size,))
            x_SD = _rows(x_ND, pairs_S // k)
            a_SF, u_SF = dot(x_SD, w_gate_DF).astype(dtype), dot(x_SD, w_up_DF).astype(dtype)
            gates_S = jnp.where(jnp.arange(size) < left, gates_P[pairs_S], 0)
            hidden_SF = jax.nn.silu(a_SF.astype(jnp.float32)) * u_SF.astype(jnp.float32) * gates_S[:, None]
            return (
                y_ND.at[pairs_S // k].add(dot(hidden_SF.astype(dtype), w_down_FD)),
                lax.dynamic_update_slice(a_PF, to_bits(a_SF), (row, 0)),
                lax.dynamic_update_slice(u_PF, to_bits(u_SF), (row, 0)),
            )

        return _over_blocks(plan, e, block, carry)

    hidden_PF = to_bits(jnp.zeros((plan.order_P.shape[0], width), dtype))
    empty = (jnp.zeros(x_ND.shape, jnp.float32), hidden_PF, hidden_PF)
    parts = [lax.fori_loop(start, stop, expert, empty) for start, stop in streams.ranges(experts)]
    y_ND = functools.reduce(jnp.add, [y_ND for y_ND, *_ in parts])
    hidden = [hidden for _, *hidden in parts]
    return y_ND.astype(dtype), (x_ND, gates_NK, w_gate_EDF, w_up_EDF, w_down_EFD, plan, hidden)


def _backward(kept: tuple, g_ND: Array) -> tuple[Array | None, ...]:
    x_ND, gates_NK, w_gate_EDF, w_up_EDF, w_down_EFD, plan, hidden = kept
    k, width, dtype = gates_NK.shape[1], w_gate_EDF.shape[2], x_ND.dtype
    gates_P = gates_NK.reshape(-1)

    def expert(e: Array, carry: tuple, first: int, a_PF: Array, u_PF: Array) -> tuple:
        dx_ND, dgates_P, *dw_E = carry
        w_gate_DF, w_up_DF, w_down_FD = (_rows(w, e) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))

        def block(size: int, row: Array, left: Array, carry: tuple) -> tuple:
            dx_ND, dgates_P, dw_gate_DF, dw_up_DF, dw_down_FD = carry
            pairs_S = lax.dynamic_slice(plan.order_P, (row,), (size,))
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
        dx_ND, dgates_P, *dw = _over_blocks(plan, e, block, (dx_ND, dgates_P, *zeros))
        dw_E = [lax.dynamic_update_index_in_dim(w, new, e - first, 0) for w, new in zip(dw_E, dw, strict=True)]
        return (dx_ND, dgates_P, *dw_E)

    parts, weights = [], (w_gate_EDF, w_up_EDF, w_down_EFD)
    for (start, stop), (a_PF, u_PF) in zip(streams.ranges(w_gate_EDF.shape[0]), hidden, strict=True):
        # Weight gradients stay float32 here: rounding them in the loop would be a pass over them of its own.
        empty = [jnp.zeros((stop - start, *w.shape[1:]), jnp.float32) for w in weights]
        empty = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(gates_P.shape, jnp.float32), *empty)
        turn = functools.partial(expert, first=start, a_PF=a_PF, u_PF=u_PF)
        parts.append(lax.fori_loop(start, stop, turn, empty))
    dx, dgates, *dw = zip(*parts, strict=True)
    dx_ND, dgates_P = functools.reduce(jnp.add, dx), functools.reduce(jnp.add, dgates)
    dw_gate_EDF, dw_up_EDF, dw_down_EFD = (jnp.concatenate(part).astype(dtype) for part in dw)
    return dx_ND.astype(dtype), None, dgates_P.reshape(gates_NK.shape), dw_gate_EDF, dw_up_EDF, dw_down_EFD


grouped_swiglu.defvjp(_forward, _backward)
