"""lm-eval's model class on the engine: whatever task the installed lm-eval knows is asked of our own programs.

What a task asks is turned into tokens, cut and read as lm-eval's own `hf` backend does it, so that both give the same
scores; what differs is who computes them.
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

_AT_A_TIME = 128  # requests that the engine is given at once
_FILTERS = ("temperature", "top_p", "top_k", "min_p")  # of lm-eval's keywords, those that a draw knows


class UnfitError(ValueError):
    """A task asks for what this model or engine cannot do."""


class Pair(NamedTuple):
    """Token ids of a text, and of what follows it and is scored."""

    context: list[int]
    continuation: list[int]


class Harness(TemplateLM):
    """A model for `lm_eval.simple_evaluate`. All is greedy unless a task asks for draws, which have fixed seeds."""

    def __init__(self, loaded: Loaded, *, capacity: Capacity, devices: jax.sharding.Mesh | None = None):
        """capacity: of the engine; its length is the longest context. Raises ValueError without a tokenizer."""
        super().__init__()
        self._words = loaded.need_tokenizer()
        self._engine = Engine(loaded.params, loaded.model, capacity=capacity, tokenizer=self._words, mesh=devices)
        # Names of special ids in a text are read as these ids: a chat template writes them so.
        self._reader = tokenizers.Tokenizer.from_str(self._words.backend.to_str())
        self._reader.encode_special_tokens = False
        self._bos, self._eos = (self._reader.id_to_token(i) for i in (self._words.bos_id, self._words.eos_id))
        begins = self._reader.encode("a").ids[:1] == [self._words.bos_id]
        self._add_bos = bool(self._words.settings.get("add_bos_token", begins))

    @property
    def max_length(self) -> int:
        """Tokens that the model may look at."""
        return self._engine.capacity.length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number: lm-eval's default, or half of a shorter model's positions."""
        return min(256, self.max_length // 2)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context is scored behind."""
        return self._words.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Another one for other ids: lm-eval keeps requests by it."""
        return hashlib.blake2b(self._words.identity.encode(), digest_size=8).hexdigest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, behind the begin id if the tokenizer is one that adds it and the text does not name it."""
        begin = self._add_bos and not has_bos_prefix(string, self._bos)
        begin = begin if add_special_tokens is None else add_special_tokens and self._add_bos
        ids = self._reader.encode(string, add_special_tokens=False).ids
        return [self._words.bos_id] * begin + ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, or DeepSeek-V2's if it has none; None if none is asked for."""
        return self._words.template.source if chat_template else None

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a prompt for an answer, up to the last message's text, to be continued."""
        text = self._words.template.render(chat_history, generation=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows that do not overlap: each as long as the model allows."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [window for several in windows for window in several]
        scores = iter(self._score(flat, "rolling" if not disable_tqdm else ""))
        totals = [sum(next(scores)[0] for _ in several) for several in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's stop strings. Raises UnfitError for odd keywords."""
        asked = [self._question(number, *request.args) for number, request in enumerate(requests)]
        results = self._generate([question for question, _ in asked], "answering" if not disable_tqdm else "")
        texts = []
        for request, (_, until), result in zip(requests, asked, results, strict=True):
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
                f"the task asks for {new} new tokens, and the model has {self.max_length} positions; "
                "--max-gen-toks gives it fewer"
            )
        draws = named.pop("do_sample")
        odd = sorted(name for name in named if name not in _FILTERS)
        if odd:
            raise UnfitError(f"the task asks for {', '.join(odd)} in its generation_kwargs, which the engine has not")
        sampling = Sampling(**{name: named[name] for name in named}) if draws else Sampling(temperature=0)
        prompt = self.tok_encode(context)[-(self.max_length - new) :]
        stop = tuple(term for term in until if term)
        return (
            Request(
                prompt=tuple(prompt),
                max_new=new,
                sampling=sampling,
                seed=seed,
                stop_ids=(self._words.eos_id,),
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
        """(log-likelihood in nats, whether greedy) of the continuations; contexts that are too long lose their head."""
        asked = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise UnfitError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with {self.max_length} positions"
                )
            ids = tuple((context + continuation)[-(self.max_length + 1) :])
            asked.append(Request(prompt=ids, max_new=0, score_from=len(ids) - len(continuation)))
        return [
            (sum(logprob for logprob, _ in result.scores), all(greedy for _, greedy in result.scores))
            for result in self._generate(asked, what)
        ]

    def _generate(self, asked: Sequence[Request], what: str) -> list[Result]:
        """The answers, in order. Equal beginnings follow each other, so that the engine computes them once."""
        order = sorted(range(len(asked)), key=lambda i: asked[i].prompt)
        results: dict[int, Result] = {}
        for some in _track([order[at : at + _AT_A_TIME] for at in range(0, len(order), _AT_A_TIME)], what):
            results.update(zip(some, self._engine.generate([asked[i] for i in some]), strict=True))
        return [results[i] for i in range(len(asked))]


def _track(parts: Sequence[list[int]], what: str) -> Iterable[list[int]]:
    """A bar on a terminal, the first process's; nothing in a log."""
    console = rich.console.Console(stderr=True, quiet=not processes.is_first())
    return rich.progress.track(parts, what, console=console, disable=not (what and console.is_terminal))
