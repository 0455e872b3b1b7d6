"""Routed experts: tokens are sent to the devices of their experts, and each device runs a grouped SwiGLU."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Moe
from dsv2_jax.ops.cpu import experts as cpu
from dsv2_jax.ops.cpu.experts import Weights
from dsv2_jax.ops.switch import Execution
from dsv2_jax.parallel import expert
from dsv2_jax.parallel.expert import Bounds, Work
from dsv2_jax.parallel.mesh import EXPERT
from pallas_kernels import expert_dispatch


class Choice(NamedTuple):
    """experts_BTK int32, E for a dropped pair; gates_BTK float32."""

    experts_BTK: Array
    gates_BTK: Array


def routed(
    x_BTD: Array,
    choice: Choice,
    weights: Weights,
    moe: Moe,
    run: Execution,
    *,
    dropping: bool,
    overlap: tuple[Work, Work] | None = None,
) -> tuple[Array, Array | None]:
    """sum over k of gates_k FFN_k(x), the routed part of eq. 20: ([B, T, D] in x's dtype, the result of `overlap`).

    Args:
      x_BTD: The FFN's input, in the compute dtype.
      choice: The experts of each token.
      weights: w_gate_EDF, w_up_EDF, w_down_EFD of this device's experts, in the compute dtype or quantized.
      moe: The settings.
      run: The mesh and the implementation.
      dropping: Whether the budgets of section 2.2.4 bound the pairs of a device.
      overlap: Work to run during the all-to-all (see `parallel.expert.dispatch`).
    """
    (b, t, d), mesh = x_BTD.shape, run.mesh
    limits = expert.bounds(moe, mesh, b, t, dropping=dropping)

    def local(x_ND: Array, experts_NK: Array, gates_NK: Array) -> Array:
        return _local_experts(x_ND, experts_NK, gates_NK, weights, limits, run)

    flat = (-1, moe.num_experts_per_tok)
    experts_NK, gates_NK = choice.experts_BTK.reshape(flat), choice.gates_BTK.reshape(flat)
    y_ND, overlapped = expert.dispatch(
        x_BTD.reshape(-1, d), experts_NK, gates_NK, local, limits, mesh, overlap, run.layer
    )
    return y_ND.reshape(x_BTD.shape), overlapped


def _local_experts(
    x_ND: Array, experts_NK: Array, gates_NK: Array, weights: Weights, limits: Bounds, run: Execution
) -> Array:
    if run.implementation == "pallas":
        sizes = {"max_pairs": limits.pairs, "buffer_size": limits.buffer_size}
        return expert_dispatch.grouped_swiglu(x_ND, experts_NK, gates_NK, weights, **sizes)
    if run.mesh.size(*EXPERT) == 1:
        return cpu.grouped_swiglu(x_ND, experts_NK, gates_NK, weights)
    # Blocks of rows include rows that no device sent, which may be NaN. `where` zeroes them in x, and in the backward
    # pass in the gradient.
    sent_N1 = (experts_NK < limits.own).any(axis=1, keepdims=True)
    y_ND = cpu.grouped_swiglu(jnp.where(sent_N1, x_ND, 0), experts_NK, gates_NK, weights)
    return jnp.where(sent_N1, y_ND, 0)
