"""The router: each token's experts, the balance losses, and token dropping (section 2.2)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import SINGLE, Mesh, Moe
from dsv2_jax.config.model import RouterName
from dsv2_jax.parallel import collectives, context
from dsv2_jax.parallel.mesh import CONTEXT, EXPERT


class Routing(NamedTuple):
    """scores_BTE float32: affinities s_i, which sum to one. experts_BTK int32 and gates_BTK float32: the choice."""

    scores_BTE: Array
    experts_BTK: Array
    gates_BTK: Array


class RouterKind(NamedTuple):
    """What the kinds of routers differ in; parameters.ROUTERS has their parameters.

    affinities: of the logits [B, T, E], along the last axis. compared: what the top K compares, from affinities and
    parameters; None for the affinities themselves. of_group: a group's score, from those of its experts along the last
    axis. normalised: whether gates are divided by their sum over the K chosen. first_choices: whether the expert loss
    counts only these.
    """

    affinities: Callable[..., Array] = jax.nn.softmax  # eq. 22
    compared: Callable[[Array, dict[str, Array]], Array] | None = None
    of_group: Callable[..., Array] = functools.partial(jnp.max, axis=-1)
    normalised: bool = False
    first_choices: bool = False


KINDS: dict[RouterName, RouterKind] = {
    "deepseek": RouterKind(),
    "gshard": RouterKind(normalised=True, first_choices=True),
}


class SequenceMeans(NamedTuple):
    """What the balance losses are made of: means over each sequence's valid tokens, float32.

    f_BE: choices of an expert, 1 on average (the gshard router counts first choices). p_BE: affinities. f_device_BG,
    p_BG: of a group's experts, the mean and the sum. f_sent_BG: tokens sent to a group. tokens_B1: number of tokens.
    """

    tokens_B1: Array
    f_BE: Array
    p_BE: Array
    f_device_BG: Array
    p_BG: Array
    f_sent_BG: Array


# The balance losses of each sequence [B], without their factors, under the names of the factors in the config. The
# training loss adds up all of them, and the metrics have all of them.
LOSSES: dict[str, Callable[[SequenceMeans], Array]] = {
    "expert_balance": lambda s: (s.f_BE * s.p_BE).sum(axis=-1),  # eq. 23
    "device_balance": lambda s: (s.f_device_BG * s.p_BG).sum(axis=-1),  # eq. 26
    "communication_balance": lambda s: (s.f_sent_BG * s.p_BG).sum(axis=-1),  # eq. 29
}


def route(x_BTD: Array, p: dict[str, Array], moe: Moe, experts_BTK: Array | None = None) -> Routing:
    """Device-limited top-K routing in float32 (eq. 21 and 22, section 2.2.2).

    Experts are chosen from the M groups whose best expert has the highest affinity. A gate is the affinity times
    `routed_scaling_factor`. KINDS says what the kinds of routers change.

    Args:
      x_BTD: The FFN's input.
      p: The layer's parameters; of these `w_router_DE`, the expert centroids e_i, float32.
      moe: The settings.
      experts_BTK: The experts of an earlier call, to use instead of choosing; only gates are computed (routing replay).
    """
    kind = KINDS[moe.router]
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), p["w_router_DE"], precision="highest")
    scores_BTE = kind.affinities(logits_BTE, axis=-1)  # eq. 22
    if experts_BTK is None:
        compared_BTE = kind.compared(scores_BTE, p) if kind.compared else scores_BTE
        chosen_BTK, experts_BTK = _top_experts(compared_BTE, moe, kind)
    else:
        experts_BTK, chosen_BTK = experts_BTK.astype(jnp.int32), None
    if chosen_BTK is None or kind.compared:
        chosen_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
    if kind.normalised:
        chosen_BTK = chosen_BTK / chosen_BTK.sum(axis=-1, keepdims=True)
    return Routing(scores_BTE, experts_BTK, chosen_BTK * moe.routed_scaling_factor)  # eq. 21


def _top_experts(scores_BTE: Array, moe: Moe, kind: RouterKind) -> tuple[Array, Array]:
    """Scores and ids [B, T, K] of the top-K experts in the M groups with the highest score (section 2.2.2)."""
    eligible_BTE = scores_BTE
    if moe.topk_group < moe.n_group:
        grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], moe.n_group, -1)
        _, kept_BTM = jax.lax.top_k(kind.of_group(grouped), moe.topk_group)
        kept_BTG = jax.nn.one_hot(kept_BTM, moe.n_group, dtype=bool).any(axis=-2)
        eligible_BTE = jnp.where(kept_BTG[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)
    chosen_BTK, experts_BTK = jax.lax.top_k(eligible_BTE, moe.num_experts_per_tok)
    return chosen_BTK, experts_BTK


def balance(routing: Routing, valid_BT: Array, moe: Moe, mesh: Mesh = SINGLE) -> dict[str, Array]:
    """The losses of LOSSES (section 2.2.3), each averaged over the sequences with valid tokens, and the load.

    Returns float32 scalars under the names of LOSSES, factors included, and `load_E`, an expert's share of the choices
    times E, so that 1 is average. Dropped pairs count as choices. Each value is this device's part; the parts add up
    over the mesh.
    """
    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(routing.experts_BTK, moe.n_routed_experts).sum(axis=-2) * valid_BT1
    sequences = sequence_means(routing, chosen_BTE, valid_BT1, moe, mesh)
    has_tokens_B = sequences.tokens_B1[:, 0] > 0
    losses = {
        name: collectives.mean_over_sequences(loss(sequences), has_tokens_B, mesh, scale=getattr(moe, name))
        for name, loss in LOSSES.items()
    }
    counts_E = chosen_BTE.sum(axis=(0, 1))
    load_E = collectives.fraction_of_tokens(counts_E * moe.n_routed_experts, counts_E.sum(), mesh)
    return {**losses, "load_E": jax.lax.stop_gradient(load_E)}


def sequence_means(routing: Routing, chosen_BTE: Array, valid_BT1: Array, moe: Moe, mesh: Mesh) -> SequenceMeans:
    """Means over each sequence's valid tokens. chosen_BTE float32: 1 for the chosen experts of valid tokens."""
    e, g = moe.n_routed_experts, moe.n_group
    sent_BTG = chosen_BTE.reshape(*chosen_BTE.shape[:2], g, -1).max(axis=-1)
    counted_BTE, per_token = chosen_BTE, moe.num_experts_per_tok
    if KINDS[moe.router].first_choices:
        counted_BTE, per_token = jax.nn.one_hot(routing.experts_BTK[..., 0], e) * valid_BT1, 1

    over_time = (valid_BT1, counted_BTE, routing.scores_BTE * valid_BT1, sent_BTG)
    tokens_B1, counted_BE, scores_BE, sent_BG = (collectives.add(x.sum(axis=1), CONTEXT, mesh) for x in over_time)
    at_least_B1 = jnp.maximum(tokens_B1, 1)
    f_BE = counted_BE * e / (per_token * at_least_B1)  # eq. 24
    p_BE = scores_BE / at_least_B1  # eq. 25
    return SequenceMeans(
        tokens_B1=tokens_B1,
        f_BE=f_BE,
        p_BE=p_BE,
        f_device_BG=f_BE.reshape(-1, g, e // g).mean(axis=-1),  # eq. 27
        p_BG=p_BE.reshape(-1, g, e // g).sum(axis=-1),  # eq. 28 and 31
        f_sent_BG=sent_BG * g / (moe.topk_group * at_least_B1),  # eq. 30
    )


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

    sequences = moe.budget_sequences or b * mesh.size(*EXPERT)  # that share a budget
    spread = b % sequences != 0  # over devices of the expert axis
    group, priority = (context.gather(x, mesh) for x in (group_BTK, priority_BTK))
    if spread:
        group, priority = (collectives.gather(x, EXPERT, 0, mesh) for x in (group, priority))
    shape, runs = group.shape, (-1, sequences * group.shape[1] * k)
    budget = moe.budget(sequences * group.shape[1])
    within = jax.vmap(functools.partial(_within_budget, budget=budget, groups=moe.n_group))
    kept = within(group.reshape(runs), priority.reshape(runs)).reshape(shape)
    if spread:
        kept = jax.lax.dynamic_slice_in_dim(kept, collectives.index(EXPERT, mesh) * b, b)
    return context.local(kept, mesh) | exempt_B[:, None, None]


def _within_budget(group_P: Array, priority_P: Array, *, budget: int, groups: int) -> Array:
    """Whether each pair is among the `budget` pairs with the highest priority in its group."""
    index_P = jnp.arange(group_P.size, dtype=jnp.int32)
    sorted_group_P, _, order_P = jax.lax.sort((group_P, -priority_P, index_P), num_keys=3)
    starts_G = jnp.searchsorted(sorted_group_P, jnp.arange(groups))
    rank_P = jnp.zeros_like(index_P).at[order_P].set(index_P - starts_G[sorted_group_P])
    return rank_P < budget
