"""The settings of GRPO."""

import dataclasses
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Group relative policy optimization (section 4.2). A group of 0: the run is no such stage."""

    group: int = 0  # G: responses to a prompt
    prompts: int = 8  # whose groups are sampled at a time
    passes: int = 1  # over these samples, batch.size of them a step
    steps: int = 100  # of the optimizer, in all
    max_new: int = 64  # tokens of a response
    clip: float = 0.2  # epsilon
    beta: float = 0.04  # weight of the KL divergence from the reference, which is what the run started from
    level: Literal["token", "sequence"] = "token"  # what a ratio is of; see alignment/objective.py
    truncate: float = 2.0  # most weight of a token that the sampler found unlikelier than the trainer; 0: no weights
    rewards: tuple[str, ...] = ("task",)  # of alignment/verifiers.py, or folders of reward models
    weights: tuple[float, ...] = (1.0,)  # c_1, c_2, ... of their sum
    # Responses that max_new cut, of which the paper says nothing: kept like others (TRL's default), without a loss
    # (TRL's mask_truncated_completions), or with `penalty` taken from their reward. docs/alignment.md says more.
    unfinished: Literal["keep", "mask", "penalize"] = "keep"
    penalty: float = 1.0  # of an unfinished response with unfinished penalize; in units of the summed reward
    evaluate_prompts: int = 128  # held-out ones, answered greedily
    replay: bool = False  # the update sends tokens to the experts that they were sampled with
    offload: bool = False  # optimizer state waits in the host's memory while responses are sampled

    def __post_init__(self) -> None:
        for name in ("prompts", "passes", "steps", "max_new", "evaluate_prompts"):
            check(getattr(self, name) > 0, f"grpo.{name} must be positive, not {getattr(self, name)}")
        check(
            self.group == 0 or self.group > 1,
            f"grpo.group must be at least 2, not {self.group}: it is compared with itself",
        )
        check(
            self.clip > 0 and min(self.beta, self.truncate) >= 0,
            "grpo.clip must be positive, beta and truncate not negative",
        )
        check(self.penalty > 0, f"grpo.penalty must be positive, not {self.penalty}")
        check(
            len(self.rewards) == len(self.weights) > 0,
            f"grpo.rewards and grpo.weights must be as many, not {len(self.rewards)} and {len(self.weights)}",
        )
