"""The engine's interface: a request, the events of its tokens, and its result."""

import dataclasses
from typing import Literal

import numpy as np

from dsv2_jax.config import Model, check
from dsv2_jax.inference.sampling import Sampling

TOP = 20  # maximum number of alternatives of a token that a request may ask for
Reason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue, to score, or both."""

    prompt: tuple[int, ...]
    max_new: int = 128  # maximum number of new tokens; 0: only score
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0  # equal requests with equal seeds get equal tokens, independent of other requests
    stop_ids: tuple[int, ...] = ()  # any of these tokens ends the sequence and is its last token
    stop: tuple[str, ...] = ()  # any of these strings ends the sequence and is left out of the text
    text: bool = False  # whether events and the result have text
    top: int = 0  # number of alternatives of each new token to return
    score_from: int | None = None  # return log-probabilities of the prompt's tokens from this index on

    def check(self, model: Model, max_length: int) -> None:
        """Raises ValueError for a request that cannot be served. max_length: maximum number of tokens of a sequence."""
        check(len(self.prompt) > 0, "the prompt is empty")
        lowest, highest = min(self.prompt), max(self.prompt)
        check(
            lowest >= 0 and highest < model.vocab_size,
            f"prompt ids must be from 0 to {model.vocab_size - 1} (the vocabulary); found {lowest} to {highest}",
        )
        check(
            self.max_new > 0 or (self.max_new == 0 and self.score_from is not None),
            f"max-new must be positive, not {self.max_new}",
        )
        check(  # the last token of a prompt that is only scored is not computed
            len(self.prompt) - (self.max_new == 0) + self.max_new <= max_length,
            f"{len(self.prompt)} prompt tokens and {self.max_new} new tokens exceed the limit of {max_length}",
        )
        check(
            self.score_from is None or 0 < self.score_from <= len(self.prompt),
            f"score_from must be from 1 to {len(self.prompt)}, the length of the prompt: the first token has no "
            "log-probability",
        )
        check(0 <= self.top <= TOP, f"top must be from 0 to {TOP}, not {self.top}")
        check(all(self.stop), "stop strings must not be empty")
        biased = [token for token, _ in self.sampling.logit_bias]
        check(
            all(0 <= token < model.vocab_size for token in biased),
            f"logit_bias has a token id outside the vocabulary of {model.vocab_size}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestEvent:
    """The result of a step for one request. Log-probabilities are the model's, before temperature, filters and bias.

    token: the new token, or None if the request ended without one. text: the text that it adds, without characters that
    may begin a stop string; these come with a later event. top: alternatives as (token, log-probability), the most
    probable first.
    """

    id: int
    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    reason: Reason | None = None  # set in the last event of a request
    result: "Result | None" = None  # set in the last event of a request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a request. scores: (log-probability, whether greedy) of prompt tokens from `score_from` on.

    experts: int16 [n, L, K], the expert choices of the first n tokens, prompt included, in every MoE layer. The last
    token has none, because it was not computed. None unless the engine was built with `routes`.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    reason: Reason
    scores: tuple[tuple[float, bool], ...]
    reused: int  # prompt tokens that were found in the cache
    experts: np.ndarray | None = None
