"""DeepSeekMoE (section 2.2): shared experts for every token, routed experts for those that chose them."""

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import SINGLE, Mesh, Moe
from dsv2_jax.model import router
from dsv2_jax.model.grouped import grouped_swiglu
from dsv2_jax.model.layers import Kernels, gated
from dsv2_jax.model.matmul import project
from dsv2_jax.parallel import collectives, expert
from dsv2_jax.parallel.mesh import BATCH
from pallas_kernels import expert_dispatch


def mixture(
    p: dict[str, Array],
    x_BTD: Array,
    valid_BT: Array,
    exempt_B: Array | None,
    moe: Moe,
    mesh: Mesh = SINGLE,
    kernels: Kernels = "xla",
    experts_BTK: Array | None = None,
    layer: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """The MoE layer's FFN without its residual: (result [B, T, D] in x's dtype, statistics).

    valid_BT bool: padding goes to no expert. exempt_B bool: sequences that are never dropped; None is evaluation, where
    nothing is dropped. Statistics: those of `router.balance`, `dropped` (share of the valid pairs), which add up over
    the devices, and `experts_BTK`. experts_BTK: see `router.route`; layer: see `expert.dispatch`.
    """
    routing = router.route(x_BTD, p["w_router_DE"], moe, experts_BTK)
    valid_BT1 = valid_BT[..., None]
    kept_BTK = jnp.broadcast_to(valid_BT1, routing.experts_BTK.shape)
    dropping = exempt_B is not None and moe.capacity_factor > 0
    if exempt_B is not None and dropping:
        kept_BTK &= router.drop(routing, valid_BT, exempt_B, moe, mesh)

    (b, t), own = valid_BT.shape, moe.n_routed_experts // mesh.expert

    def experts(x_ND: Array, experts_NK: Array, gates_NK: Array) -> Array:
        weights = p["w_gate_EDF"], p["w_up_EDF"], p["w_down_EFD"]
        if kernels == "xla":
            if mesh.expert == 1:
                return grouped_swiglu(x_ND, experts_NK, gates_NK, *weights)
            # Products of whole blocks read rows that nobody sent, of x here and of the gradient on the way back.
            sent_N1 = (experts_NK < own).any(axis=1, keepdims=True)
            y_ND = grouped_swiglu(jnp.where(sent_N1, x_ND, 0), experts_NK, gates_NK, *weights)
            return jnp.where(sent_N1, y_ND, 0)
        return expert_dispatch.grouped_swiglu(
            x_ND,
            experts_NK,
            gates_NK,
            weights,
            max_pairs=expert.most_pairs(moe, mesh, b, t, dropping=dropping),
            buffer_size=expert.pairs_at_a_time(moe, b, t),
        )

    tokens = (-1, moe.num_experts_per_tok)
    beside = None
    if moe.n_shared_experts:
        up = expert.Work(_shared_up, (x_BTD, p["w_gate_DX"], p["w_up_DX"]))
        beside = up, expert.Work(_shared_down, (p["w_down_XD"],))
    y_ND, shared = expert.dispatch(
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        jnp.where(kept_BTK, routing.experts_BTK, moe.n_routed_experts).reshape(tokens),
        routing.gates_BTK.reshape(tokens),
        experts,
        moe,
        mesh,
        expert.most_rows(moe, mesh, b, t, dropping=dropping),
        beside,
        layer,
    )
    y_BTD = y_ND.reshape(x_BTD.shape)
    if shared is not None:
        y_BTD += shared

    pairs = collectives.add(valid_BT.sum() * moe.num_experts_per_tok, (*BATCH, "context"), mesh)
    dropped = (valid_BT1 & ~kept_BTK).sum() / (jnp.maximum(pairs, 1) * mesh.tensor)
    statistics = router.balance(routing, valid_BT, moe, mesh) | {
        "dropped": jax.lax.stop_gradient(dropped),
        "experts_BTK": routing.experts_BTK,
    }
    return collectives.add(y_BTD, ("tensor",), mesh), statistics


def _shared_up(x_BTD: Array, w_gate_DX: Array, w_up_DX: Array) -> Array:
    with jax.named_scope("shared_experts"):
        return gated(x_BTD, w_gate_DX, w_up_DX)


def _shared_down(hidden_BTX: Array, w_down_XD: Array) -> Array:
    with jax.named_scope("shared_experts"):
        return project(hidden_BTX, w_down_XD)
