"""GRPO's objective (section 4.2, eq. 32 to 34), of log-probabilities: no network, no sampling.

Equation 32 as printed weighs a whole response by one ratio, pi(o|q) / pi_old(o|q), and averages over the group. The
default here is the reading that trainers have settled on (TRL's `loss_type="grpo"`): a ratio for every token, the mean
over a response's tokens, then over responses. `level="sequence"` is the equation to the letter, its KL term the mean
over the response's tokens. Letters: P prompts, G responses of a group, N responses in all, T tokens of a response.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Level = Literal["token", "sequence"]


def advantages(rewards_PG: Array) -> Array:
    """(r - mean) / std over each group (eq. 34), float32 [P, G].

    The standard deviation is the group's own (divided by G). A group whose rewards are all alike says nothing: zeros.
    """
    rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    alike_P1 = rewards_PG.max(axis=1, keepdims=True) == rewards_PG.min(axis=1, keepdims=True)
    std_P1 = jnp.sqrt((centred_PG**2).mean(axis=1, keepdims=True))
    return jnp.where(alike_P1, 0.0, centred_PG / jnp.where(alike_P1, 1.0, std_P1))


def kl(policy: Array, reference: Array) -> Array:
    """pi_ref / pi - log(pi_ref / pi) - 1 of log-probabilities, elementwise: never negative (eq. 33)."""
    ahead = reference - policy
    return jnp.exp(ahead) - ahead - 1


def truncated_ratio(old: Array, sampler: Array, most: float) -> Array:
    """How much likelier the trainer's old policy finds a token than the sampler that drew it, at most `most`.

    Weighs a token's loss, so that the sampler's other arithmetic (a MoE's above all) does not bias the gradient. Takes
    log-probabilities; has no gradient.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old - sampler), most))


def objective(
    policy_NT: Array,
    old_NT: Array,
    reference_NT: Array,
    advantages_N: Array,
    mask_NT: Array,
    *,
    clip: float,
    beta: float,
    level: Level = "token",
    correction_NT: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Minus GRPO's objective, summed over responses (its mean over all of a step is the step's loss), and metrics.

    Log-probabilities of the responses' tokens under the policy, the one that sampled, and the reference, float32; mask
    1 where a token is one; clip is epsilon and beta the weight of the KL divergence. correction_NT weighs the tokens'
    first term (see `truncated_ratio`; with the level `sequence` its mean over a response does). Metrics are sums over
    responses too: `kl` and `clipped` (share of a response's tokens, or of responses, where clipping took the gradient).
    """
    lengths_N = jnp.maximum(mask_NT.sum(axis=1), 1)

    def mean(x_NT: Array) -> Array:
        return (x_NT * mask_NT).sum(axis=1) / lengths_N

    weights_NT = jnp.ones_like(mask_NT) if correction_NT is None else correction_NT
    kl_N = mean(kl(policy_NT, reference_NT))
    ahead_NT = (policy_NT - old_NT) * mask_NT
    if level == "token":
        term_NT, clipped_NT = _clipped(jnp.exp(ahead_NT), advantages_N[:, None], clip)
        term_N, clipped_N = mean(term_NT * weights_NT), mean(clipped_NT)
    else:
        term_N, clipped_N = _clipped(jnp.exp(ahead_NT.sum(axis=1)), advantages_N, clip)
        term_N *= mean(weights_NT)
    return (beta * kl_N - term_N).sum(), {"kl": kl_N.sum(), "clipped": clipped_N.sum()}


def _clipped(ratio: Array, advantage: Array, clip: float) -> tuple[Array, Array]:
    """min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A), and 1 where the second is smaller."""
    free, bound = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    return jnp.minimum(free, bound), (bound < free).astype(jnp.float32)
