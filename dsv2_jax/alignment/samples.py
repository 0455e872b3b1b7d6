"""GRPO's prompts, its sampled responses, and both as arrays to train on."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from dsv2_jax.alignment import objective, verifiers
from dsv2_jax.config import Config, Grpo, check
from dsv2_jax.data import chat
from dsv2_jax.data.corpora import Corpus, Source
from dsv2_jax.data.packing import Batch, blank_batch
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.parallel import processes

Question = tuple[dict[str, Any], tuple[int, ...]]  # a data item and its prompt's ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One response. answer: its ids with the end of sequence; logprobs: the sampler's log-probabilities of these.

    finished: whether it ends with the end of sequence; if not, it reached grpo.max_new. experts: int16 [n - 1, L, K] of
    all n tokens of prompt and answer except the last, or None.
    """

    item: dict[str, Any]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    rewards: dict[str, float]
    finished: bool = True
    experts: np.ndarray | None = None


class Prompts(grain.DatasetIterator[Question]):
    """An endless iterator of prompts in the chat template, shuffled by the seed in each epoch.

    Its state is the index of the next prompt. Prompts too long for a response of grpo.max_new tokens are skipped.
    Raises ValueError if all of them are, and for an item without the fields that the rewards need.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer: Tokenizer):
        super().__init__()
        self._config, self._tokenizer, self._next = config, tokenizer, 0
        train = self._questions(corpus.train)
        self._held_out = self._questions(corpus.held_out)
        check(
            bool(train and self._held_out),
            f"every prompt is too long for grpo.max_new ({config.grpo.max_new}) tokens within batch.length "
            f"({config.batch.length})",
        )
        self._order = grain.MapDataset.source(train).seed(config.seed).shuffle().repeat()
        self._digest = corpus.digest

    def __next__(self) -> Question:
        question: Any = self._order[self._next]
        self._next += 1
        return question

    def held_out(self, count: int) -> list[Question]:
        """`count` held-out questions, evenly spaced over the split, or all if there are fewer."""
        count = min(count, len(self._held_out))
        return [self._held_out[i * len(self._held_out) // count] for i in range(count)]

    def get_state(self) -> dict[str, Any]:
        """The state as a JSON value."""
        return {"corpus": self._digest, "seed": self._config.seed, "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of other data or another seed."""
        for name, value in self.get_state().items():
            check(
                name == "next" or state.get(name) == value,
                f"the saved position in the prompts is for {name} {state.get(name)!r}, and this run has {value!r}",
            )
        self._next = state["next"]

    def _questions(self, source: Source) -> list[Question]:
        found = []
        for number in range(len(source)):
            item = json.loads(source[number]["text"])
            verifiers.check_item(self._config.grpo.rewards, item, source[number]["name"].decode())
            prompt = item["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = chat.encode(messages, self._tokenizer, generation=True).ids
            if len(ids) + self._config.grpo.max_new <= self._config.batch.length:
                found.append((item, tuple(ids.tolist())))
        return found


def mixed(sample: Sample, grpo: Grpo) -> float:
    """c1 r1 + c2 r2 + ... of a response, minus the penalty for an unfinished one with `grpo.unfinished penalize`."""
    total = sum(c * sample.rewards[name] for name, c in zip(grpo.rewards, grpo.weights, strict=True))
    return total - grpo.penalty * (grpo.unfinished == "penalize" and not sample.finished)


def arrays(samples: list[Sample], config: Config) -> tuple[Batch, dict[str, float]]:
    """Rows to train on, each a prompt followed by a response, and figures of the rewards.

    The leaves are those of `blank_batch` except `bytes_BT`, and:
      sampler_BT float32: the sampler's log-probabilities.
      advantages_BT float32: equal along a row, computed from all responses, unfinished ones included.
      experts_BTLK int16: the sampler's choices, with `grpo.replay`.
      kept_BT float32: 0 in the rows of unfinished responses, with `grpo.unfinished mask`.
    weights_BT is 1 / (tokens of the response) at each token of the response. samples must be ordered group by group.
    """
    length, group = config.batch.length, config.grpo.group
    rows = blank_batch(len(samples), length) | {"sampler_BT": np.zeros((len(samples), length), np.float32)}
    del rows["bytes_BT"]
    if config.grpo.replay:
        layers, experts = config.model.moe_layers, config.model.moe.num_experts_per_tok
        rows["experts_BTLK"] = np.zeros((len(samples), length, layers, experts), np.int16)
    for row, sample in enumerate(samples):
        ids = np.array(sample.prompt + sample.answer, np.int32)
        count, first = len(ids) - 1, len(sample.prompt) - 1
        rows["tokens_BT"][row, :count], rows["targets_BT"][row, :count] = ids[:-1], ids[1:]
        rows["positions_BT"][row, :count], rows["segments_BT"][row, :count] = np.arange(count), 1
        rows["weights_BT"][row, first:count] = 1 / len(sample.answer)
        rows["sampler_BT"][row, first:count] = sample.logprobs
        if config.grpo.replay:
            assert sample.experts is not None
            rows["experts_BTLK"][row, :count] = sample.experts
    finished_B = np.array([sample.finished for sample in samples], np.float32)
    if config.grpo.unfinished == "mask":
        rows["kept_BT"] = np.repeat(finished_B[:, None], length, axis=1)
    total = np.array([mixed(sample, config.grpo) for sample in samples], np.float32)
    advantages_B = np.asarray(objective.advantages(jnp.asarray(total.reshape(-1, group)))).reshape(-1)
    rows["advantages_BT"] = np.repeat(advantages_B[:, None], length, axis=1)
    spread = total.reshape(-1, group).std(axis=1)
    figures = {
        "reward": float(total.mean()),
        "reward_spread": float(spread.mean()),
        "groups_without_signal": float((spread == 0).mean()),
        "response_tokens": float(np.mean([len(s.answer) for s in samples])),
        "unfinished": float(1 - finished_B.mean()),
    }
    return rows, figures | {
        f"reward_{Path(name).name}": float(np.mean([s.rewards[name] for s in samples])) for name in config.grpo.rewards
    }


class Samples:
    """A readable JSONL file of responses; a context manager. Opening it drops the lines of `step` and later ones.

    Only the first process writes.
    """

    def __init__(self, path: Path, step: int):
        self._path = path if processes.is_first() else Path(os.devnull)
        if processes.is_first():
            partial = path.with_name(f"{path.name}.tmp")
            kept = "".join(line for line in self._lines() if json.loads(line)["step"] < step)
            partial.write_text(kept, encoding="utf-8")
            os.replace(partial, path)
        self._file = self._path.open("a", encoding="utf-8")

    def _lines(self) -> Iterator[str]:
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            yield from (line for line in lines if line.endswith("\n"))

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, samples: list[Sample]) -> None:
        """Appends one line per response."""
        for sample in samples:
            line = {"step": step, "prompt": sample.item["prompt"], "response": sample.text, "rewards": sample.rewards}
            line["finished"] = sample.finished
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
