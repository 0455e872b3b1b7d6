"""What the engine is asked, what it says at every token, and what it answers in the end."""

import dataclasses
from typing import Literal

import numpy as np

from dsv2_jax.config import Model, check
from dsv2_jax.inference.sampling import Sampling

TOP = 20  # most alternatives that can be asked for at each token
Reason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue, to score, or both."""

    prompt: tuple[int, ...]
    max_new: int = 128  # 0: only score
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0  # with it, equal requests get equal tokens, whatever else runs
    stop_ids: tuple[int, ...] = ()  # a token of these ends the sequence and is its last
    stop: tuple[str, ...] = ()  # a text of these ends it; it is not part of the text
    text: bool = False  # tell the text of new tokens
    top: int = 0  # tell so many alternatives of each new token
    score_from: int | None = None  # tell log-probabilities of the prompt's tokens from this one on

    def check(self, model: Model, longest: int) -> None:
        """Raises ValueError for what the model cannot do. longest: tokens that one sequence may have."""
        check(len(self.prompt) > 0, "a prompt holds no token")
        lowest, highest = min(self.prompt), max(self.prompt)
        check(
            lowest >= 0 and highest < model.vocab_size,
            f"prompt ids must lie in 0 to {model.vocab_size - 1}, the model's vocabulary; found {lowest} to {highest}",
        )
        check(
            self.max_new > 0 or (self.max_new == 0 and self.score_from is not None),
            f"max-new must be positive, not {self.max_new}",
        )
        check(  # of a prompt that is only scored, the last token is never looked at
            len(self.prompt) - (self.max_new == 0) + self.max_new <= longest,
            f"{len(self.prompt)} prompt tokens and {self.max_new} new ones exceed the model's {longest} positions",
        )
        check(
            self.score_from is None or 0 < self.score_from <= len(self.prompt),
            f"score_from must lie in 1 to the prompt's {len(self.prompt)} tokens: the first has no log-probability",
        )
        check(0 <= self.top <= TOP, f"at most {TOP} alternatives of a token can be told, not {self.top}")
        check(all(self.stop), "a stop string is empty")
        biased = [token for token, _ in self.sampling.logit_bias]
        check(
            all(0 <= token < model.vocab_size for token in biased),
            f"logit_bias names a token outside the model's vocabulary of {model.vocab_size}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What a step did to one request. Log-probabilities are the model's own: of no temperature, filter or bias.

    token: the new one, or None when the request ended without. text: what it adds, held back while a stop string may be
    beginning. top: alternatives as (token, log-probability), the most probable first.
    """

    id: int
    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    reason: Reason | None = None  # set in a request's last event
    result: "Result | None" = None  # and with it, the whole answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A request's answer. scores: of the prompt's tokens from `score_from` on, (log-probability, whether greedy).

    experts: int16 [n, L, K], those of the first n tokens, prompt included, in every MoE layer; the newest token, which
    was not computed, has none. None unless the engine was asked for them.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    reason: Reason
    scores: tuple[tuple[float, bool], ...]
    reused: int  # tokens of the prompt that were found in the cache
    experts: np.ndarray | None = None
