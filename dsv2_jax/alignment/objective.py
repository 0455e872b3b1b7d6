"""GRPO's objective (section 4.2, eq. 32 to 34) as a function of log-probabilities: no network, no sampling.

Equation 32 as printed has one ratio per response, pi(o|q) / pi_old(o|q), and averages over the group. The default here
is the common reading (TRL's `loss_type="grpo"`): one ratio per token, the mean over a response's tokens, then the mean
over responses. `level="sequence"` is the printed equation, with the KL term averaged over the response's tokens.

    P prompts    G responses of a group    N responses of all groups    T tokens of a response
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Level = Literal["token", "sequence"]


class LogProbabilities(NamedTuple):
    """Log-probabilities of the responses' tokens, float32 [N, T], under the three policies of the objective."""

    policy: Array  # the one that is trained
    old: Array  # the one that sampled the responses
    reference: Array  # the one that the KL divergence is measured against


def advantages(rewards_PG: Array) -> Array:
    """(r - mean) / std over each group (eq. 34), float32 [P, G].

    The standard deviation divides by G. A group with equal rewards gives zeros.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    equal_P1 = rewards_PG.max(axis=1, keepdims=True) == rewards_PG.min(axis=1, keepdims=True)
    std_P1 = jnp.sqrt((centred_PG**2).mean(axis=1, keepdims=True))
    return jnp.where(equal_P1, 0.0, centred_PG / jnp.where(equal_P1, 1.0, std_P1))


def kl(policy: Array, reference: Array) -> Array:
    """pi_ref / pi - log(pi_ref / pi) - 1 from log-probabilities, elementwise; never negative (eq. 33)."""
    ahead = reference - policy
    return jnp.exp(ahead) - ahead - 1


def truncated_ratio(old: Array, sampler: Array, limit: float) -> Array:
    """min(pi_old / pi_sampler, limit) from log-probabilities, elementwise, without gradient.

    It weights a token's loss to correct for the difference between the trainer's and the sampler's arithmetic, which
    is largest in MoE models.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old - sampler), limit))


def objective(
    logp_NT: LogProbabilities,
    advantages_N: Array,
    mask_NT: Array,
    *,
    clip: float,
    beta: float,
    level: Level = "token",
    correction_NT: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Minus GRPO's objective (eq. 32), summed over responses, and metrics; the step's loss is their mean.

    mask_NT is 1 at a response's tokens and 0 at padding. clip is epsilon; beta weights the KL divergence. correction_NT
    multiplies the clipped ratio's term (see `truncated_ratio`). At the level `sequence` its mean over the response
    multiplies that term instead. Metrics are sums over responses: `kl`, and `clipped`, the share of tokens (or
    responses) without gradient because of clipping.
    """
    lengths_N = jnp.maximum(mask_NT.sum(axis=1), 1)

    def mean(x_NT: Array) -> Array:
        return (x_NT * mask_NT).sum(axis=1) / lengths_N

    weights_NT = jnp.ones_like(mask_NT) if correction_NT is None else correction_NT
    kl_N = mean(kl(logp_NT.policy, logp_NT.reference))
    ahead_NT = (logp_NT.policy - logp_NT.old) * mask_NT
    if level == "token":
        term_NT, clipped_NT = _clipped(jnp.exp(ahead_NT), advantages_N[:, None], clip)
        term_N, clipped_N = mean(term_NT * weights_NT), mean(clipped_NT)
    else:
        term_N, clipped_N = _clipped(jnp.exp(ahead_NT.sum(axis=1)), advantages_N, clip)
        term_N *= mean(weights_NT)
    return (beta * kl_N - term_N).sum(), {"kl": kl_N.sum(), "clipped": clipped_N.sum()}


def _clipped(ratio: Array, advantage: Array, clip: float) -> tuple[Array, Array]:
    """(min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A), 1 where the second is smaller)."""
    free, bound = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    return jnp.minimum(free, bound), (bound < free).astype(jnp.float32)
