"""The settings of GRPO."""

import dataclasses
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Group relative policy optimization (section 4.2). A group of 0 turns it off."""

    group: int = 0  # G: responses per prompt
    prompts: int = 8  # prompts per sampling round
    passes: int = 1  # epochs over the samples of a round; a step takes batch.size of them
    steps: int = 100  # optimizer steps in total
    max_new: int = 64  # maximum number of tokens of a response
    clip: float = 0.2  # epsilon
    beta: float = 0.04  # weight of the KL divergence from the reference, the model of --init
    level: Literal["token", "sequence"] = "token"  # level of the probability ratio; see alignment/objective.py
    truncate: float = 2.0  # limit of a token's importance weight pi_old / pi_sampler; 0: no weights
    rewards: tuple[str, ...] = ("task",)  # names of alignment/verifiers.py, or folders of reward models
    weights: tuple[float, ...] = (1.0,)  # c_1, c_2, ...: their weights in the sum
    # Responses that reach max_new, which the paper does not mention: keep them (TRL's default), mask their loss (TRL's
    # mask_truncated_completions), or subtract `penalty` from their reward. See docs/fine_tuning.md.
    unfinished: Literal["keep", "mask", "penalize"] = "keep"
    penalty: float = 1.0  # subtracted with unfinished penalize, in units of the summed reward
    evaluate_prompts: int = 128  # held-out prompts per evaluation, answered greedily
    replay: bool = False  # routing replay: the update reuses the sampler's expert choices
    offload: bool = False  # moves the optimizer state to host memory during sampling

    def __post_init__(self) -> None:
        for name in ("prompts", "passes", "steps", "max_new", "evaluate_prompts"):
            check(getattr(self, name) > 0, f"grpo.{name} must be positive, not {getattr(self, name)}")
        check(
            self.group == 0 or self.group > 1,
            f"grpo.group must be at least 2, not {self.group}: advantages are relative to the group",
        )
        check(
            self.clip > 0 and min(self.beta, self.truncate) >= 0,
            "grpo.clip must be positive; grpo.beta and grpo.truncate must be at least 0",
        )
        check(self.penalty > 0, f"grpo.penalty must be positive, not {self.penalty}")
        check(
            len(self.rewards) == len(self.weights) > 0,
            f"grpo.rewards and grpo.weights must have the same length, not {len(self.rewards)} and {len(self.weights)}",
        )
