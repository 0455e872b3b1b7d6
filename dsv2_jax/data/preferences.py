"""Training data of a reward model: pairs of a better and a worse answer, or answers with a score.

The two answers of a pair are in one row, each as a segment that starts with the prompt. A row holds as many pairs as
fit.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data import chat
from dsv2_jax.data.packing import Batch, Documents, UncutRows
from dsv2_jax.data.tokenizer import Tokenizer


class Preference(NamedTuple):
    """A pair or a scored answer. answers: the ids of full conversations, the better one first.

    value: the score of a single answer; the margin between the scores of a pair.
    """

    answers: tuple[np.ndarray, ...]
    value: float


def read(text: str, tokenizer: Tokenizer) -> Preference:
    """Parses a document of the form `preferences`."""
    item: Any = json.loads(text)
    if "score" in item:
        return Preference((_answered(item["messages"], tokenizer),), float(item["score"]))
    prompt = item["prompt"]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = (
        _answered([*before, {"role": "assistant", "content": item[name]}], tokenizer) for name in ("chosen", "rejected")
    )
    return Preference(tuple(answers), float(item.get("margin", 0)))


def _answered(messages: chat.Messages, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a conversation up to the last one of the assistant's answer, where GRPO's responses end too."""
    encoded = chat.encode(messages, tokenizer)
    last = np.flatnonzero(encoded.answers)[-1:] if messages[-1]["role"] == "assistant" else []
    return encoded.ids[: last[0] + 1] if len(last) else encoded.ids


def rows(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> "PreferenceRows":
    """The rows of a split. Raises ValueError if no preference fits in a row."""
    packed = PreferenceRows([read(text, tokenizer) for text in documents], length)
    check(len(packed) > 0, f"no preference fits in the {length} tokens of a row (batch.length)")
    return packed


class PreferenceRows(UncutRows):
    """Rows of preferences; those longer than a row are dropped.

    Leaves [B, T]: tokens, positions and segments int32. At the last token of each answer, `ends_BT` float32 is 1, or -1
    for the worse answer of a pair, and `pairs_BT` int32 is the preference's index in the row. At the last token of the
    first answer, `values_BT` float32 is the preference's value and `weights_BT` float32 is 1. All are 0 elsewhere.
    """

    def __init__(self, preferences: list[Preference], length: int) -> None:
        # The packing counts pairs, one less than ids, so a preference is a document with one more id.
        sizes = np.array([sum(map(len, p.answers)) for p in preferences], np.int64)
        ends = np.cumsum(sizes + 1)
        super().__init__(Documents(np.zeros(0, np.int32), ends), length, np.zeros(1, np.int32), "drop")
        self._preferences = preferences

    def _blank(self, rows: int) -> Batch:
        batch = {
            name: np.zeros((rows, self._length), np.int32) for name in ("tokens_BT", "positions_BT", "segments_BT")
        }
        batch |= {"pairs_BT": np.zeros((rows, self._length), np.int32)}
        return batch | {n: np.zeros((rows, self._length), np.float32) for n in ("ends_BT", "values_BT", "weights_BT")}

    def fill(self, batch: Batch, row: int, index: int) -> None:
        at = segment = 0
        for number, document in enumerate(self._rows[index]):
            preference = self._preferences[document]
            for better, ids in zip((True, False), preference.answers, strict=False):
                segment += 1
                here = (row, slice(at, at + len(ids)))
                batch["tokens_BT"][here] = ids
                batch["positions_BT"][here] = np.arange(len(ids))
                batch["segments_BT"][here] = segment
                at += len(ids)
                batch["ends_BT"][row, at - 1] = 1 if better else -1
                batch["pairs_BT"][row, at - 1] = number
                if better:
                    batch["values_BT"][row, at - 1] = preference.value
                    batch["weights_BT"][row, at - 1] = 1
