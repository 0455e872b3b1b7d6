"""lm-eval's model class on the engine, which runs every task of the installed lm-eval.

Requests are tokenised, truncated and decoded as in lm-eval's `hf` backend, so that both give the same scores.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import lm_eval.utils
import rich.console
import rich.progress
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from dsv2_jax.data.chat import Messages
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request, Result
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.loading import Loaded
from dsv2_jax.parallel import processes

_AT_A_TIME = 128  # requests in one call of the engine
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # lm-eval's keywords that `Sampling` has too


class UnfitError(ValueError):
    """A task needs something that this model or engine does not support."""


class Pair(NamedTuple):
    """Token ids of a context, and of its continuation, which is scored."""

    context: list[int]
    continuation: list[int]


class Harness(TemplateLM):
    """A model for `lm_eval.simple_evaluate`. Decoding is greedy unless a task samples, which uses fixed seeds."""

    def __init__(self, loaded: Loaded, *, capacity: Capacity, devices: jax.sharding.Mesh | None = None):
        """capacity: of the engine; its length limits the context. Raises ValueError without a tokenizer."""
        super().__init__()
        self._tokenizer = loaded.need_tokenizer()
        self._engine = Engine(loaded.params, loaded.model, capacity=capacity, tokenizer=self._tokenizer, mesh=devices)
        # Reads names of special tokens in a text as their ids, because chat templates write such names.
        self._reader = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
        self._reader.encode_special_tokens = False
        self._bos, self._eos = (self._reader.id_to_token(i) for i in (self._tokenizer.bos_id, self._tokenizer.eos_id))
        begins = self._reader.encode("a").ids[:1] == [self._tokenizer.bos_id]
        self._add_bos = bool(self._tokenizer.settings.get("add_bos_token", begins))

    @property
    def max_length(self) -> int:
        """The longest context in tokens."""
        return self._engine.capacity.length

    @property
    def max_gen_toks(self) -> int:
        """New tokens for tasks without a number: lm-eval's default, but at most half of the context."""
        return min(256, self.max_length // 2)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes a text without context."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name that identifies the tokenizer; lm-eval caches requests by it."""
        return hashlib.blake2b(self._tokenizer.identity.encode(), digest_size=8).hexdigest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after the begin id if the tokenizer adds one and the text does not start with it."""
        begin = self._add_bos and not has_bos_prefix(string, self._bos)
        begin = begin if add_special_tokens is None else add_special_tokens and self._add_bos
        ids = self._reader.encode(string, add_special_tokens=False).ids
        return [self._tokenizer.bos_id] * begin + ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, or DeepSeek-V2's if it has none; None without `chat_template`."""
        return self._tokenizer.template.source if chat_template else None

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt it ends with the last message, to be continued."""
        text = self._tokenizer.template.render(chat_history, generation=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods (nats) of full texts, in disjoint windows of the longest context."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [window for several in windows for window in several]
        scores = iter(self._score(flat, "rolling" if not disable_tqdm else ""))
        totals = [sum(next(scores)[0] for _ in several) for several in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string of the task. Raises UnfitError for unsupported keywords."""
        questions = [self._question(number, *request.args) for number, request in enumerate(requests)]
        results = self._generate([question for question, _ in questions], "answering" if not disable_tqdm else "")
        texts = []
        for request, (_, until), result in zip(requests, questions, results, strict=True):
            text = self._reader.decode(list(result.tokens), skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _question(self, seed: int, context: str, settings: dict[str, Any]) -> tuple[Request, list[str]]:
        """The request for a context, and its stop strings."""
        named: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = handle_stop_sequences(named.pop("until"), eos=self._eos)
        new = named.pop("max_gen_toks")
        if not 0 < new < self.max_length:
            raise UnfitError(
                f"the task needs {new} new tokens, and the model has {self.max_length} positions; "
                "set a smaller number with --max-gen-toks"
            )
        sampled = named.pop("do_sample")
        unknown = sorted(name for name in named if name not in _SAMPLING)
        if unknown:
            raise UnfitError(f"the engine does not support the task's generation_kwargs {', '.join(unknown)}")
        sampling = Sampling(**{name: named[name] for name in named}) if sampled else Sampling(temperature=0)
        prompt = self.tok_encode(context)[-(self.max_length - new) :]
        stop = tuple(term for term in until if term)
        return (
            Request(
                prompt=tuple(prompt),
                max_new=new,
                sampling=sampling,
                seed=seed,
                stop_ids=(self._tokenizer.eos_id,),
                stop=stop,
                text=True,
            ),
            until,
        )

    def _windows(self, text: str) -> Iterator[Pair]:
        pairs = lm_eval.utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return (Pair(*lm_eval.utils.make_disjoint_window(pair)) for pair in pairs)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_unused: Any,
    ) -> list[tuple[float, bool]]:
        scores = self._score([Pair(a, b) for _, a, b in requests], "scoring" if not disable_tqdm else "")
        for (texts, *_ids), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _score(self, pairs: Sequence[Pair], what: str) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of the continuations; long contexts lose their beginning."""
        scored = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise UnfitError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with {self.max_length} positions"
                )
            ids = tuple((context + continuation)[-(self.max_length + 1) :])
            scored.append(Request(prompt=ids, max_new=0, score_from=len(ids) - len(continuation)))
        return [
            (sum(logprob for logprob, _ in result.scores), all(greedy for _, greedy in result.scores))
            for result in self._generate(scored, what)
        ]

    def _generate(self, requests: Sequence[Request], what: str) -> list[Result]:
        """The results in order. Runs requests sorted by prompt, so that the engine computes equal prefixes once."""
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt)
        results: dict[int, Result] = {}
        for some in _track([order[at : at + _AT_A_TIME] for at in range(0, len(order), _AT_A_TIME)], what):
            results.update(zip(some, self._engine.generate([requests[i] for i in some]), strict=True))
        return [results[i] for i in range(len(requests))]


def _track(parts: Sequence[list[int]], what: str) -> Iterable[list[int]]:
    """The parts, with a progress bar if the first process's stderr is a terminal."""
    console = rich.console.Console(stderr=True, quiet=not processes.is_first())
    return rich.progress.track(parts, what, console=console, disable=not (what and console.is_terminal))
