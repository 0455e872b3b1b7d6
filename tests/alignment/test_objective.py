"""GRPO's objective: against a float64 derivation written out in numpy, and against TRL's trainer on the same logits."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from dsv2_jax.alignment import objective

N, T, W = 6, 5, 11
CLIP, BETA = 0.2, 0.04


@pytest.fixture(scope="module")
def case():
    """Logits of a policy that has moved away from the one that sampled, responses of unlike lengths."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(N, T, W)) * 2
    tokens = random.integers(0, W, (N, T))
    mask = (np.arange(T) < np.array([5, 1, 3, 4, 2, 5])[:, None]).astype(float)
    advantages = np.array([1.2, -0.7, 0.0, 0.5, -1.5, 0.3])
    policy = log_probabilities(logits, tokens)
    old = policy + random.normal(size=(N, T)) * 0.3
    reference = policy + random.normal(size=(N, T)) * 0.5
    return logits, tokens, old, reference, advantages, mask


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_probabilities(logits, tokens):
    return np.take_along_axis(log_softmax(logits), tokens[..., None], -1)[..., 0]


def by_hand(case, level, weights=None):
    """Loss, and its gradient with respect to the logits from the derivative of each term, in float64."""
    logits, tokens, old, reference, advantages, mask = case
    weights = np.ones((N, T)) if weights is None else weights
    policy = log_probabilities(logits, tokens)
    loss, d_policy = 0.0, np.zeros((N, T))
    for n in range(N):
        length = int(mask[n].sum())
        a, here = advantages[n], slice(0, length)
        ahead = policy[n, here] - old[n, here]
        if level == "token":
            for t in range(length):
                rho = np.exp(ahead[t])
                bound = min(max(rho, 1 - CLIP), 1 + CLIP) * a
                loss -= weights[n, t] * min(rho * a, bound) / length
                if rho * a <= bound:
                    d_policy[n, t] -= weights[n, t] * rho * a / length
        else:
            rho, w = np.exp(ahead.sum()), weights[n, here].mean()
            bound = min(max(rho, 1 - CLIP), 1 + CLIP) * a
            loss -= w * min(rho * a, bound)
            if rho * a <= bound:
                d_policy[n, here] -= w * rho * a
        for t in range(length):
            u = np.exp(reference[n, t] - policy[n, t])
            loss += BETA * (u - np.log(u) - 1) / length
            d_policy[n, t] += BETA * (1 - u) / length
    chosen = np.eye(W)[tokens]
    return loss, d_policy[..., None] * (chosen - np.exp(log_softmax(logits)))


def ours(case, level="token", weights=None):
    logits, tokens, old, reference, advantages, mask = (jnp.asarray(x) for x in case)

    def loss(logits):
        policy = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        correction = None if weights is None else jnp.asarray(weights)
        logp = objective.LogProbabilities(policy, old, reference)
        return objective.objective(logp, advantages, mask, clip=CLIP, beta=BETA, level=level, correction_NT=correction)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    return value, gradient, metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_and_gradient_are_those_derived_by_hand(case, level, weighted):
    weights = np.random.default_rng(1).uniform(0.3, 2, (N, T)) if weighted else None
    value, gradient, _ = ours(case, level, weights)
    want, want_gradient = by_hand(case, level, weights)
    assert value == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-6)


def test_the_default_is_trls(case):
    logits, tokens, old, reference, advantages, mask = case
    logits = torch.tensor(logits, requires_grad=True)
    policy = torch.gather(torch.log_softmax(logits, -1), -1, torch.tensor(tokens)[..., None])[..., 0]
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros(N, T), None),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1),
        _entropy_bonus_enabled=False,
        model=types.SimpleNamespace(training=False),
        loss_type="grpo", importance_sampling_level="token", beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, tools=None,
        _metrics={"eval": collections.defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(N, 1),
        "completion_ids": torch.tensor(tokens),
        "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(reference),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    theirs.backward()
    value, gradient, _ = ours(case)
    assert value / N == pytest.approx(theirs.item(), rel=1e-5)
    np.testing.assert_allclose(gradient / N, logits.grad, rtol=1e-4, atol=1e-7)


def test_metrics(case):
    logits, tokens, old, reference, advantages, mask = case
    policy = log_probabilities(logits, tokens)
    _, _, metrics = ours(case)
    u = np.exp(reference - policy)
    assert metrics["kl"] == pytest.approx((((u - np.log(u) - 1) * mask).sum(1) / mask.sum(1)).sum(), rel=1e-5)
    rho, a = np.exp(policy - old), advantages[:, None]
    clipped = ((rho > 1 + CLIP) & (a > 0)) | ((rho < 1 - CLIP) & (a < 0))
    assert metrics["clipped"] == pytest.approx(((clipped * mask).sum(1) / mask.sum(1)).sum())
    assert 0 < metrics["clipped"] < N


def test_advantages_by_hand():
    rewards = [[0.0, 1.0, 1.0, 2.0], [0.3, 0.3, 0.3, 0.3]]
    got = objective.advantages(jnp.array(rewards))
    root = 2**0.5
    np.testing.assert_allclose(got, [[-root, 0, 0, root], [0, 0, 0, 0]], atol=1e-6)


def test_the_ratio_to_the_sampler_is_truncated_and_has_no_gradient():
    old, sampler = jnp.log(jnp.array([0.2, 0.9])), jnp.log(jnp.array([0.4, 0.1]))
    np.testing.assert_allclose(objective.truncated_ratio(old, sampler, 2.0), [0.5, 2.0], rtol=1e-6)
    assert not jax.grad(lambda x: objective.truncated_ratio(x, sampler, 2.0).sum())(old).any()
