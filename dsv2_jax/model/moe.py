"""DeepSeekMoE (section 2.2): shared experts for every token, routed experts for the tokens that chose them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Moe
from dsv2_jax.model import router
from dsv2_jax.model.layers import gated
from dsv2_jax.ops import experts
from dsv2_jax.ops.matmul import project
from dsv2_jax.ops.switch import Execution
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.expert import Work
from dsv2_jax.parallel.mesh import TENSOR


class RoutedTokens(NamedTuple):
    """The router's inputs in addition to the hidden states.

    valid_BT bool: False for padding, which goes to no expert. exempt_B bool: sequences that drop nothing; None in
    evaluation, where no token is dropped. experts_BTK: given experts (see `router.route`), or None.
    """

    valid_BT: Array
    exempt_B: Array | None = None
    experts_BTK: Array | None = None


def mixture(
    p: dict[str, Array], x_BTD: Array, tokens: RoutedTokens, moe: Moe, run: Execution
) -> tuple[Array, dict[str, Array]]:
    """sum_s FFN_s(x) + sum_i g_i FFN_i(x), the MoE layer without its residual (eq. 20): ([B, T, D], statistics).

    The statistics are those of `router.balance`, `dropped` (the dropped share of the valid token-expert pairs) and
    `experts_BTK`. All but `experts_BTK` are this device's part of a sum over the mesh.
    """
    routing = router.route(x_BTD, p, moe, tokens.experts_BTK)
    valid_BT1, exempt_B = tokens.valid_BT[..., None], tokens.exempt_B
    dropping = exempt_B is not None and moe.capacity_factor > 0
    kept_BTK = jnp.broadcast_to(valid_BT1, routing.experts_BTK.shape)
    if exempt_B is not None and dropping:
        kept_BTK &= router.kept(routing, tokens.valid_BT, exempt_B, moe, run.mesh)

    choice = experts.Choice(jnp.where(kept_BTK, routing.experts_BTK, moe.n_routed_experts), routing.gates_BTK)
    weights = p["w_gate_EDF"], p["w_up_EDF"], p["w_down_EFD"]
    shared_ffn = _shared_ffn(p, x_BTD) if moe.n_shared_experts else None
    routed_BTD, shared_BTD = experts.routed(x_BTD, choice, weights, moe, run, dropping=dropping, overlap=shared_ffn)
    y_BTD = routed_BTD if shared_BTD is None else shared_BTD + routed_BTD  # eq. 20

    pairs = tokens.valid_BT.sum() * moe.num_experts_per_tok
    dropped = collectives.fraction_of_tokens((valid_BT1 & ~kept_BTK).sum(), pairs, run.mesh)
    statistics = router.balance(routing, tokens.valid_BT, moe, run.mesh) | {
        "dropped": jax.lax.stop_gradient(dropped),
        "experts_BTK": routing.experts_BTK,
    }
    return collectives.add(y_BTD, TENSOR, run.mesh), statistics


def _shared_ffn(p: dict[str, Array], x_BTD: Array) -> tuple[Work, Work]:
    """The shared experts, one SwiGLU of their joint width, in two parts: one for each direction of the all-to-all."""
    return Work(_shared_up, (x_BTD, p["w_gate_DX"], p["w_up_DX"])), Work(_shared_down, (p["w_down_XD"],))


def _shared_up(x_BTD: Array, w_gate_DX: Array, w_up_DX: Array) -> Array:
    with jax.named_scope("shared_experts"):
        return gated(x_BTD, w_gate_DX, w_up_DX)


def _shared_down(hidden_BTX: Array, w_down_XD: Array) -> Array:
    with jax.named_scope("shared_experts"):
        return project(hidden_BTX, w_down_XD)
