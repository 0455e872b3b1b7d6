"""The gate: which experts a token goes to, what keeps them in balance, and which pairs a full device drops (2.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import SINGLE, Mesh, Moe
from dsv2_jax.parallel import collectives, context
from dsv2_jax.parallel.mesh import BATCH


class Routing(NamedTuple):
    """scores_BTE float32: affinities s_i, summing to one. experts_BTK int32 and gates_BTK float32: the choice."""

    scores_BTE: Array
    experts_BTK: Array
    gates_BTK: Array


def route(x_BTD: Array, w_router_DE: Array, moe: Moe, experts_BTK: Array | None = None) -> Routing:
    """Top-K among the experts of the M groups whose best expert has the highest affinity (section 2.2.2), in float32.

    The gate is the affinity times `routed_scaling_factor`; only the gshard router normalises it over the K chosen.
    experts_BTK int: the choice is made already, and only gates are computed (routing replay).
    """
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), w_router_DE, precision="highest")
    scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    if experts_BTK is None:
        chosen_BTK, experts_BTK = _choose(scores_BTE, moe)
    else:
        experts_BTK = experts_BTK.astype(jnp.int32)
        chosen_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if moe.router == "gshard":
        chosen_BTK = chosen_BTK / chosen_BTK.sum(axis=-1, keepdims=True)
    return Routing(scores_BTE, experts_BTK, chosen_BTK * moe.routed_scaling_factor)


def _choose(scores_BTE: Array, moe: Moe) -> tuple[Array, Array]:
    eligible_BTE = scores_BTE
    if moe.topk_group < moe.n_group:
        grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], moe.n_group, -1)
        _, kept_BTM = jax.lax.top_k(grouped.max(axis=-1), moe.topk_group)
        kept_BTG = jax.nn.one_hot(kept_BTM, moe.n_group, dtype=bool).any(axis=-2)
        eligible_BTE = jnp.where(kept_BTG[..., None], grouped, -1.0).reshape(scores_BTE.shape)
    chosen_BTK, experts_BTK = jax.lax.top_k(eligible_BTE, moe.num_experts_per_tok)
    return chosen_BTK, experts_BTK


def balance(routing: Routing, valid_BT: Array, moe: Moe, mesh: Mesh = SINGLE) -> dict[str, Array]:
    """The three balance losses, factors included (section 2.2.3, eq. 23 to 31), and each expert's load.

    Each loss is computed per sequence over its valid tokens and averaged over the sequences that have any. Choices are
    counted before anything is dropped. Returns float32 scalars `expert_balance`, `device_balance`,
    `communication_balance`, and `load_E`: an expert's share of the choices times E, so 1 is average. Each is this
    device's part: over the devices of the mesh they add up.
    """
    e, g, k = moe.n_routed_experts, moe.n_group, moe.num_experts_per_tok

    def over_time(x_BT: Array) -> Array:
        return collectives.add(x_BT.sum(axis=1), ("context",), mesh)

    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    valid_tokens_B1 = over_time(valid_BT1)
    tokens_B1 = jnp.maximum(valid_tokens_B1, 1)
    chosen_BTE = jax.nn.one_hot(routing.experts_BTK, e).sum(axis=-2) * valid_BT1
    sent_BTG = chosen_BTE.reshape(*valid_BT.shape, g, -1).max(axis=-1)
    if moe.router == "gshard":  # its loss counts first choices
        counted_BTE, per_token = jax.nn.one_hot(routing.experts_BTK[..., 0], e) * valid_BT1, 1
    else:
        counted_BTE, per_token = chosen_BTE, k

    f_BE = over_time(counted_BTE) * e / (per_token * tokens_B1)
    p_BE = over_time(routing.scores_BTE * valid_BT1) / tokens_B1
    p_BG = p_BE.reshape(-1, g, e // g).sum(axis=-1)
    f_device_BG = f_BE.reshape(-1, g, e // g).mean(axis=-1)
    f_communication_BG = over_time(sent_BTG) * g / (moe.topk_group * tokens_B1)

    sequence_B = (valid_tokens_B1[:, 0] > 0).astype(jnp.float32)
    sequences = jnp.maximum(collectives.add(sequence_B.sum(), BATCH, mesh), 1)
    alike = mesh.size("context", "tensor")  # devices that hold the same sums

    def averaged(factor: float, f_B: Array, p_B: Array) -> Array:
        return factor * ((f_B * p_B).sum(axis=-1) * sequence_B).sum() / (sequences * alike)

    counts_E = chosen_BTE.sum(axis=(0, 1))
    choices = jnp.maximum(collectives.add(counts_E.sum(), (*BATCH, "context"), mesh), 1)
    return {
        "expert_balance": averaged(moe.expert_balance, f_BE, p_BE),
        "device_balance": averaged(moe.device_balance, f_device_BG, p_BG),
        "communication_balance": averaged(moe.communication_balance, f_communication_BG, p_BG),
        "load_E": jax.lax.stop_gradient(counts_E * e / (choices * mesh.tensor)),
    }


def drop(routing: Routing, valid_BT: Array, exempt_B: Array, moe: Moe, mesh: Mesh = SINGLE) -> Array:
    """Device-level token dropping (section 2.2.4): bool [B, T, K], the token-expert pairs that are kept.

    For every `budget_sequences` sequences a group may compute capacity_factor times the average number of pairs over
    groups. Beyond that, its pairs of lowest affinity are dropped, the later one of equals. Pairs of exempt sequences
    come first and are kept even when they alone exceed the budget; padding comes last. Which pairs are kept does not
    depend on the mesh: devices that hold parts of sequences with one budget tell each other their affinities.
    """
    b, _, k = routing.experts_BTK.shape
    scores_BTE = jax.lax.stop_gradient(routing.scores_BTE)
    affinity_BTK = jnp.take_along_axis(scores_BTE, routing.experts_BTK, axis=-1)
    priority_BTK = jnp.where(exempt_B[:, None, None], 2.0, affinity_BTK)
    priority_BTK = jnp.where(valid_BT[..., None], priority_BTK, -1.0)
    group_BTK = routing.experts_BTK // (moe.n_routed_experts // moe.n_group)

    together = moe.budget_sequences or b * mesh.expert
    apart = b % together != 0
    group, priority = (context.whole(x, mesh) for x in (group_BTK, priority_BTK))
    if apart:
        group, priority = (collectives.gather(x, ("expert",), 0, mesh) for x in (group, priority))
    shape, runs = group.shape, (-1, together * group.shape[1] * k)
    within = jax.vmap(functools.partial(_within, budget=moe.budget(together * group.shape[1]), groups=moe.n_group))
    kept = within(group.reshape(runs), priority.reshape(runs)).reshape(shape)
    if apart:
        kept = jax.lax.dynamic_slice_in_dim(kept, collectives.index(("expert",), mesh) * b, b)
    return context.part(kept, mesh) | exempt_B[:, None, None]


def _within(group_P: Array, priority_P: Array, *, budget: int, groups: int) -> Array:
    """Which pairs are among the `budget` of highest priority in their group."""
    index_P = jnp.arange(group_P.size, dtype=jnp.int32)
    sorted_group_P, _, order_P = jax.lax.sort((group_P, -priority_P, index_P), num_keys=3)
    starts_G = jnp.searchsorted(sorted_group_P, jnp.arange(groups))
    rank_P = jnp.zeros_like(index_P).at[order_P].set(index_P - starts_G[sorted_group_P])
    return rank_P < budget
