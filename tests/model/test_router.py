"""Routing, balance losses and dropping against loops over tokens in float64, written from the paper's section 2.2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv2_jax.config import Moe
from dsv2_jax.model import router
from dsv2_jax.model.moe import RoutedTokens, mixture
from dsv2_jax.ops.switch import Execution

MOE = Moe(
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=1,
    moe_intermediate_size=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    expert_balance=0.3,
    device_balance=0.5,
    communication_balance=0.7,
)
GSHARD = dataclasses.replace(MOE, router="gshard", num_experts_per_tok=2, n_group=1, topk_group=1)
LOSSES = ("expert_balance", "device_balance", "communication_balance")
LENGTHS = (9, 5, 0)  # valid tokens of the three rows; the last one is all padding
VALID_BT = np.arange(9) < np.array(LENGTHS)[:, None]


def tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, 9, 8)).astype(np.float32), rng.standard_normal((8, 12)).astype(np.float32)


def route(x_BTD, w_router_DE, moe: Moe) -> router.Routing:
    return router.route(jnp.asarray(x_BTD), {"w_router_DE": jnp.asarray(w_router_DE, jnp.float32)}, moe)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def choose(x_D: np.ndarray, w_DE: np.ndarray, moe: Moe) -> tuple[np.ndarray, list[int], list[float]]:
    """One token's affinities, its experts by falling affinity, and their gates."""
    s = softmax(x_D.astype(np.float64) @ w_DE.astype(np.float64))
    size = moe.n_routed_experts // moe.n_group
    groups = sorted(range(moe.n_group), key=lambda g: -max(s[g * size : (g + 1) * size]))[: moe.topk_group]
    among = [e for g in groups for e in range(g * size, (g + 1) * size)]
    experts = sorted(among, key=lambda e: -s[e])[: moe.num_experts_per_tok]
    whole = sum(s[experts]) if moe.router == "gshard" else 1.0
    return s, experts, [moe.routed_scaling_factor * s[e] / whole for e in experts]


def choose_all(x: np.ndarray, w: np.ndarray, moe: Moe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all tokens: affinities [B, T, E], experts and gates [B, T, K]."""
    rows = [[choose(token, w, moe) for token in row] for row in x]
    scores, experts, gates = (np.array([[token[i] for token in row] for row in rows]) for i in range(3))
    return scores, experts, gates


def routed(scores_BTE, experts_BTK) -> router.Routing:
    """A routing of these affinities and choices, with gates of one."""
    return router.Routing(jnp.asarray(scores_BTE), experts_BTK, jnp.ones(experts_BTK.shape))


@pytest.mark.parametrize("moe", [MOE, GSHARD, dataclasses.replace(MOE, n_group=1, topk_group=1)])
def test_choices_and_gates(moe):
    x, w = tokens()
    scores, experts, gates = choose_all(x, w, moe)
    routing = route(x, w, moe)
    np.testing.assert_array_equal(routing.experts_BTK, experts)
    np.testing.assert_allclose(routing.scores_BTE, scores, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(routing.gates_BTK, gates, rtol=2e-5)


def test_the_group_limit_matters_and_counts_the_best_expert_of_a_group():
    """A group with the single best expert is kept over one whose experts are better together."""
    scores = np.log([0.30, 0.01, 0.01, 0.20, 0.19, 0.02, 0.17, 0.05, 0.02, 0.01, 0.01, 0.01])
    routing = route(jnp.ones((1, 1, 1)), scores[None], MOE)
    assert routing.experts_BTK.tolist() == [[[0, 3, 4]]]  # groups 0 and 1; without the limit the same
    scores = np.log([0.30, 0.01, 0.01, 0.20, 0.04, 0.02, 0.17, 0.16, 0.06, 0.01, 0.01, 0.01])
    routing = route(jnp.ones((1, 1, 1)), scores[None], MOE)
    assert routing.experts_BTK.tolist() == [[[0, 3, 4]]]  # not 6, of group 2


def test_the_gate_is_float32_whatever_the_activations_are():
    x, w = tokens()
    low = jnp.asarray(x, jnp.bfloat16)
    routing = route(low, w, MOE)
    assert routing.scores_BTE.dtype == routing.gates_BTK.dtype == jnp.float32
    scores, _, _ = choose_all(np.asarray(low, np.float32), w, MOE)
    np.testing.assert_allclose(routing.scores_BTE, scores, rtol=2e-5, atol=1e-7)


def expected_losses(scores: np.ndarray, experts: np.ndarray, lengths: tuple[int, ...], moe: Moe) -> dict:
    """Equations 23 to 31, a sequence at a time, averaged over the sequences that have tokens."""
    e_all, groups, k = moe.n_routed_experts, moe.n_group, moe.num_experts_per_tok
    size = e_all // groups
    totals, sequences, load = np.zeros(3), 0, np.zeros(e_all)
    for row, length in enumerate(lengths):
        if not length:
            continue
        sequences += 1
        f, sent, p = np.zeros(e_all), np.zeros(groups), np.zeros(e_all)
        for t in range(length):
            chosen = list(experts[row, t])
            for e in chosen:
                load[e] += 1
            for e in chosen[:1] if moe.router == "gshard" else chosen:
                f[e] += e_all / ((1 if moe.router == "gshard" else k) * length)
            for g in {e // size for e in chosen}:
                sent[g] += groups / (moe.topk_group * length)
            p += scores[row, t] / length
        for g in range(groups):
            of_group = range(g * size, (g + 1) * size)
            p_g = sum(p[e] for e in of_group)
            totals[1] += sum(f[e] for e in of_group) / size * p_g
            totals[2] += sent[g] * p_g
        totals[0] += sum(f[e] * p[e] for e in range(e_all))
    factors = np.array([getattr(moe, name) for name in LOSSES])
    return dict(zip(LOSSES, factors * totals / sequences, strict=True)) | {"load_E": load * e_all / load.sum()}


@pytest.mark.parametrize("moe", [MOE, GSHARD])
def test_balance_losses_and_load(moe):
    x, w = tokens()
    scores, experts, _ = choose_all(x, w, moe)
    mine = router.balance(route(x, w, moe), jnp.asarray(VALID_BT), moe)
    theirs = expected_losses(scores, experts, LENGTHS, moe)
    assert set(mine) == set(theirs) == {*Moe.balances(), "load_E"}
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, err_msg=name)


def test_perfect_balance_costs_the_factors():
    """Every expert chosen alike with even affinities: sum f P is 1 for the first two losses, D / M over D groups."""
    experts = np.arange(12).reshape(1, 4, 3)  # each token takes one whole group
    even = routed(jnp.full((1, 4, 12), 1 / 12), jnp.asarray(experts))
    losses = router.balance(even, jnp.ones((1, 4), bool), MOE)
    np.testing.assert_allclose([losses[n] for n in LOSSES], [0.3, 0.5, 0.7 / 2], rtol=1e-6)
    np.testing.assert_array_equal(losses["load_E"], np.ones(12))


def test_gradients_of_the_balance_losses():
    x, w = tokens()
    routing = route(x, w, MOE)

    def total(scores):
        losses = router.balance(routing._replace(scores_BTE=scores), jnp.asarray(VALID_BT), MOE)
        return sum(losses[name] for name in LOSSES)

    check_grads(total, (routing.scores_BTE,), order=1, modes=["rev"], eps=0.1, rtol=1e-3, atol=1e-5)


def test_balance_gradient_reaches_the_router_through_the_affinities():
    """Choices are counted, not differentiated: the losses are linear in the affinities with f as their factor."""
    x, w = tokens()
    scores, experts, _ = choose_all(x, w, MOE)
    gradient = np.zeros(w.shape)
    for row in range(2):
        for t in range(LENGTHS[row]):
            slope = np.zeros(12)
            for e in range(12):  # one more unit of affinity to e, by differences of a linear function
                more = scores.copy()
                more[row, t, e] += 1
                after, before = (expected_losses(s, experts, LENGTHS, MOE) for s in (more, scores))
                slope[e] = sum(after[name] - before[name] for name in LOSSES)
            s = scores[row, t]
            gradient += np.outer(x[row, t], s * (slope - s @ slope))

    def total(w_router):
        losses = router.balance(route(x, w_router, MOE), jnp.asarray(VALID_BT), MOE)
        return sum(losses[name] for name in LOSSES)

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(w)), gradient, rtol=1e-4, atol=1e-6)


def expected_kept(scores, experts, valid, exempt, moe: Moe) -> np.ndarray:
    """Each group's pairs sorted: exempt ones, then by affinity, padding at the end; the earlier of equals first."""
    b, t, k = experts.shape
    budget, size = int(moe.capacity_factor * b * t * k / moe.n_group), moe.n_routed_experts // moe.n_group
    kept = np.zeros(experts.shape, bool)
    for group in range(moe.n_group):
        queue = []
        for place in np.ndindex(b, t, k):
            expert = experts[place]
            if expert // size == group:
                affinity = scores[place[0], place[1], expert]
                rank = 2 if not valid[place[:2]] else 0 if exempt[place[0]] else 1
                queue.append((rank, -affinity if rank == 1 else 0, place))
        for _, _, place in sorted(queue)[:budget]:
            kept[place] = True
    for row in range(b):
        kept[row] |= exempt[row]
    return kept


def crowded(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Affinities in sixty-fourths, so that many are equal, with most choices in the first group."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 8, (3, 9, 12)) / 64
    weights = np.r_[np.full(3, 0.25), np.full(9, 0.25 / 9)]
    experts = np.array([[rng.choice(12, 3, replace=False, p=weights) for _ in range(9)] for _ in range(3)])
    return scores.astype(np.float32), experts.astype(np.int32)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.37])
@pytest.mark.parametrize("exempt", [(False, False, False), (True, False, False), (True, True, False)])
def test_dropping(capacity, exempt):
    moe = dataclasses.replace(MOE, capacity_factor=capacity)
    for seed in range(3):
        scores, experts = crowded(seed)
        routing = routed(jnp.asarray(scores), jnp.asarray(experts))
        kept = np.asarray(router.kept(routing, jnp.asarray(VALID_BT), jnp.asarray(exempt), moe))
        np.testing.assert_array_equal(kept, expected_kept(scores, experts, VALID_BT, exempt, moe))
        if not any(exempt) and capacity <= 1:
            assert not kept[VALID_BT].all()


def test_exempt_sequences_are_kept_even_beyond_the_budget():
    """All choices fall on one group, whose budget is a quarter of them; two of three sequences are exempt."""
    experts = jnp.broadcast_to(jnp.arange(3), (3, 9, 3))
    routing = routed(jnp.full((3, 9, 12), 1 / 12), experts)
    kept = np.asarray(router.kept(routing, jnp.ones((3, 9), bool), jnp.array([True, False, True]), MOE))
    assert kept[[0, 2]].all()
    assert not kept[1].any()


def test_of_equal_pairs_the_earlier_are_kept_and_padding_goes_first():
    experts = jnp.broadcast_to(jnp.arange(3), (1, 8, 3))
    routing = routed(jnp.full((1, 8, 12), 1 / 12), experts)
    valid = jnp.arange(8)[None] >= 5  # three tokens behind five of padding; the budget is 24 / 4 = 6 pairs
    kept = np.asarray(router.kept(routing, valid, jnp.array([False]), MOE))
    assert kept[0, :, :].sum(axis=-1).tolist() == [0, 0, 0, 0, 0, 3, 3, 0]


def test_nothing_is_dropped_with_ample_capacity():
    scores, experts = crowded(0)
    routing = routed(jnp.asarray(scores), jnp.asarray(experts))
    ample = dataclasses.replace(MOE, capacity_factor=4.0)
    assert router.kept(routing, jnp.asarray(VALID_BT), jnp.zeros(3, bool), ample).all()


def expert_params(w_router: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"w_gate_EDF": (12, 8, 4), "w_up_EDF": (12, 8, 4), "w_down_EFD": (12, 4, 8)}
    shapes |= {"w_gate_DX": (8, 4), "w_up_DX": (8, 4), "w_down_XD": (4, 8)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"w_router_DE": w_router}


def ffn(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    a = x.astype(np.float64) @ gate
    return (a / (1 + np.exp(-a)) * (x.astype(np.float64) @ up)) @ down


@pytest.mark.parametrize("training", [True, False])
def test_mixture_adds_the_kept_pairs_only(training):
    """In training a dropped pair adds nothing and its gate stays as it was for the others; in evaluation all count."""
    x, w = tokens(3)
    moe, exempt = dataclasses.replace(MOE, capacity_factor=0.5), np.array([False, True, False])
    p = expert_params(w)
    scores, experts, gates = choose_all(x, w, moe)
    kept = np.broadcast_to(VALID_BT[..., None], experts.shape)
    if training:
        kept = kept & expected_kept(scores, experts, VALID_BT, exempt, moe)
    expected = np.zeros(x.shape)
    for b, t in np.argwhere(VALID_BT):
        expected[b, t] = ffn(x[b, t], p["w_gate_DX"], p["w_up_DX"], p["w_down_XD"])
        for k in range(3):
            e = experts[b, t, k]
            if kept[b, t, k]:
                expected[b, t] += gates[b, t, k] * ffn(
                    x[b, t], p["w_gate_EDF"][e], p["w_up_EDF"][e], p["w_down_EFD"][e]
                )
    y, statistics = mixture(
        jax.tree.map(jnp.asarray, p),
        jnp.asarray(x),
        RoutedTokens(jnp.asarray(VALID_BT), jnp.asarray(exempt) if training else None),
        moe,
        Execution(),
    )
    np.testing.assert_allclose(np.asarray(y)[VALID_BT], expected[VALID_BT], rtol=1e-4, atol=1e-4)
    share = (~kept[VALID_BT]).sum() / kept[VALID_BT].size
    assert float(statistics["dropped"]) == pytest.approx(share)
    assert (share > 0.05) == training
    np.testing.assert_array_equal(statistics["experts_BTK"], experts)
    for name, value in expected_losses(scores, experts, LENGTHS, moe).items():  # choices count before dropping
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5, err_msg=name)
