"""The router: each token's experts, the balance losses, and token dropping (section 2.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import SINGLE, Mesh, Moe
from dsv2_jax.parallel import collectives, context, expert

LOSSES = ("expert_balance", "device_balance", "communication_balance")  # factors in the config, keys of the metrics


class Routing(NamedTuple):
    """scores_BTE float32: affinities s_i, which sum to one. experts_BTK int32, gates_BTK float32: chosen experts."""

    scores_BTE: Array
    experts_BTK: Array
    gates_BTK: Array


class SequenceSums(NamedTuple):
    """Sums over each sequence's valid tokens, float32.

    tokens_B1: number of tokens. counted_BE: how often each expert is chosen (the gshard router counts first choices
    only). scores_BE: affinities. sent_BG: number of tokens sent to each group.
    """

    tokens_B1: Array
    counted_BE: Array
    scores_BE: Array
    sent_BG: Array


def route(x_BTD: Array, w_router_DE: Array, moe: Moe, experts_BTK: Array | None = None) -> Routing:
    """Device-limited top-K routing in float32 (eq. 21 and 22, section 2.2.2).

    Experts are chosen from the M groups whose best expert has the highest affinity. A gate is the affinity times
    `routed_scaling_factor`; the gshard router first normalises it over the K chosen.

    Args:
      x_BTD: The FFN's input.
      w_router_DE: Expert centroids e_i, float32.
      moe: The settings.
      experts_BTK: The experts of an earlier call, to use instead of choosing; only gates are computed (routing replay).
    """
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), w_router_DE, precision="highest")
    scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)  # eq. 22
    if experts_BTK is None:
        chosen_BTK, experts_BTK = _top_experts(scores_BTE, moe)
    else:
        experts_BTK = experts_BTK.astype(jnp.int32)
        chosen_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if moe.router == "gshard":
        chosen_BTK = chosen_BTK / chosen_BTK.sum(axis=-1, keepdims=True)
    return Routing(scores_BTE, experts_BTK, chosen_BTK * moe.routed_scaling_factor)  # eq. 21


def _top_experts(scores_BTE: Array, moe: Moe) -> tuple[Array, Array]:
    """Affinities and ids [B, T, K] of the top-K experts in the M groups with the highest maximum (section 2.2.2)."""
    eligible_BTE = scores_BTE
    if moe.topk_group < moe.n_group:
        grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], moe.n_group, -1)
        _, kept_BTM = jax.lax.top_k(grouped.max(axis=-1), moe.topk_group)
        kept_BTG = jax.nn.one_hot(kept_BTM, moe.n_group, dtype=bool).any(axis=-2)
        eligible_BTE = jnp.where(kept_BTG[..., None], grouped, -1.0).reshape(scores_BTE.shape)
    chosen_BTK, experts_BTK = jax.lax.top_k(eligible_BTE, moe.num_experts_per_tok)
    return chosen_BTK, experts_BTK


def balance(routing: Routing, valid_BT: Array, moe: Moe, mesh: Mesh = SINGLE) -> dict[str, Array]:
    """The three balance losses (section 2.2.3), each averaged over the sequences with valid tokens, and the load.

    Returns float32 scalars under the names of LOSSES, factors included, and `load_E`, an expert's share of the choices
    times E, so that 1 is average. Dropped pairs count as choices. Each value is this device's part; the parts add up
    over the mesh.
    """
    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(routing.experts_BTK, moe.n_routed_experts).sum(axis=-2) * valid_BT1
    sums = _sums(routing, chosen_BTE, valid_BT1, moe, mesh)
    has_tokens_B = sums.tokens_B1[:, 0] > 0
    factors = (getattr(moe, name) for name in LOSSES)
    losses = (
        collectives.mean_over_sequences(loss_B, has_tokens_B, mesh, scale=factor)
        for factor, loss_B in zip(factors, sequence_losses(sums, moe), strict=True)
    )
    counts_E = chosen_BTE.sum(axis=(0, 1))
    load_E = collectives.fraction_of_tokens(counts_E * moe.n_routed_experts, counts_E.sum(), mesh)
    return {
        **dict(zip(LOSSES, losses, strict=True)),
        "load_E": jax.lax.stop_gradient(load_E),
    }


def sequence_losses(sums: SequenceSums, moe: Moe) -> tuple[Array, Array, Array]:
    """The expert, device and communication loss of each sequence, float32 [B], without their factors (eq. 23 to 31)."""
    e, g = moe.n_routed_experts, moe.n_group
    per_token = 1 if moe.router == "gshard" else moe.num_experts_per_tok
    tokens_B1 = jnp.maximum(sums.tokens_B1, 1)

    f_BE = sums.counted_BE * e / (per_token * tokens_B1)  # eq. 24
    p_BE = sums.scores_BE / tokens_B1  # eq. 25
    f_device_BG = f_BE.reshape(-1, g, e // g).mean(axis=-1)  # eq. 27
    p_BG = p_BE.reshape(-1, g, e // g).sum(axis=-1)  # eq. 28 and 31
    f_sent_BG = sums.sent_BG * g / (moe.topk_group * tokens_B1)  # eq. 30

    return (
        (f_BE * p_BE).sum(axis=-1),  # eq. 23
        (f_device_BG * p_BG).sum(axis=-1),  # eq. 26
        (f_sent_BG * p_BG).sum(axis=-1),  # eq. 29
    )


def _sums(routing: Routing, chosen_BTE: Array, valid_BT1: Array, moe: Moe, mesh: Mesh) -> SequenceSums:
    """Sums over each sequence, including its parts on other devices."""
    sent_BTG = chosen_BTE.reshape(*chosen_BTE.shape[:2], moe.n_group, -1).max(axis=-1)
    counted_BTE = chosen_BTE
    if moe.router == "gshard":
        counted_BTE = jax.nn.one_hot(routing.experts_BTK[..., 0], moe.n_routed_experts) * valid_BT1
    over_time = (valid_BT1, counted_BTE, routing.scores_BTE * valid_BT1, sent_BTG)
    return SequenceSums(*(collectives.add(x_BT.sum(axis=1), context.AXIS, mesh) for x_BT in over_time))


def kept(routing: Routing, valid_BT: Array, exempt_B: Array, moe: Moe, mesh: Mesh = SINGLE) -> Array:
    """Device-level token dropping (section 2.2.4): bool [B, T, K], the token-expert pairs that are kept.

    For every `budget_sequences` sequences, the budget of a group is capacity_factor times the groups' average number of
    pairs. The group drops the pairs with the lowest affinity beyond its budget, and among equal ones the later. Pairs
    of exempt sequences rank first and are kept even if they alone exceed the budget. Padding ranks last. The result
    does not depend on the mesh: devices that share a budget gather their affinities.
    """
    b, _, k = routing.experts_BTK.shape
    scores_BTE = jax.lax.stop_gradient(routing.scores_BTE)
    affinity_BTK = jnp.take_along_axis(scores_BTE, routing.experts_BTK, axis=-1)
    priority_BTK = jnp.where(exempt_B[:, None, None], 2.0, affinity_BTK)
    priority_BTK = jnp.where(valid_BT[..., None], priority_BTK, -1.0)
    group_BTK = routing.experts_BTK // (moe.n_routed_experts // moe.n_group)

    sequences = moe.budget_sequences or b * mesh.expert  # number of sequences that share a budget
    spread = b % sequences != 0  # whether they are on several devices of the expert axis
    group, priority = (context.gather(x, mesh) for x in (group_BTK, priority_BTK))
    if spread:
        group, priority = (collectives.gather(x, expert.AXIS, 0, mesh) for x in (group, priority))
    shape, runs = group.shape, (-1, sequences * group.shape[1] * k)
    budget = moe.budget(sequences * group.shape[1])
    within = jax.vmap(functools.partial(_within_budget, budget=budget, groups=moe.n_group))
    kept = within(group.reshape(runs), priority.reshape(runs)).reshape(shape)
    if spread:
        kept = jax.lax.dynamic_slice_in_dim(kept, collectives.index(expert.AXIS, mesh) * b, b)
    return context.local(kept, mesh) | exempt_B[:, None, None]


def _within_budget(group_P: Array, priority_P: Array, *, budget: int, groups: int) -> Array:
    """Whether each pair is among the `budget` pairs with the highest priority in its group."""
    index_P = jnp.arange(group_P.size, dtype=jnp.int32)
    sorted_group_P, _, order_P = jax.lax.sort((group_P, -priority_P, index_P), num_keys=3)
    starts_G = jnp.searchsorted(sorted_group_P, jnp.arange(groups))
    rank_P = jnp.zeros_like(index_P).at[order_P].set(index_P - starts_G[sorted_group_P])
    return rank_P < budget
