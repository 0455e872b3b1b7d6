"""What a reward model learns from: answers of which one is better, or that are worth a number.

Both answers of a pair stand in one row, each behind the prompt and as a segment of its own, and so does every other
pair that has room there.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data import chat
from dsv2_jax.data.corpora import Source
from dsv2_jax.data.packing import Batch, Documents, WholeRows
from dsv2_jax.data.tokenizer import Tokenizer


class Preference(NamedTuple):
    """answers: the ids of whole conversations, the better one first; a single one has the `value` as its score.

    value: else by how much the better one should lead.
    """

    answers: tuple[np.ndarray, ...]
    value: float


def read(text: str, tokenizer: Tokenizer) -> Preference:
    """A document of the form `preferences`."""
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
    """The ids of a conversation up to the last one that the assistant says, where GRPO's answers end too."""
    encoded = chat.encode(messages, tokenizer)
    last = np.flatnonzero(encoded.answers)[-1:] if messages[-1]["role"] == "assistant" else []
    return encoded.ids[: last[0] + 1] if len(last) else encoded.ids


def rows(source: Source, tokenizer: Tokenizer, length: int) -> "PreferenceRows":
    """The rows of a split. Raises ValueError if no preference fits in one."""
    found = [read(source[number]["text"].decode(), tokenizer) for number in range(len(source))]
    packed = PreferenceRows(found, length)
    check(len(packed) > 0, f"no preference fits in the {length} tokens of a row (batch.length)")
    return packed


class PreferenceRows(WholeRows):
    """Rows of whole preferences; those longer than a row are dropped.

    Leaves [B, T]: tokens, positions, segments int32; `ends_BT` float32, at the last token of an answer 1, of the worse
    one of a pair -1; `pairs_BT` int32, there the number of its preference in the row; `values_BT` and `weights_BT`
    float32, the preference's value and a 1 at the end of its first answer.
    """

    def __init__(self, preferences: list[Preference], length: int) -> None:
        # To the packing a preference is a document of one id more than it has positions.
        sizes = np.array([sum(map(len, p.answers)) for p in preferences], np.int64)
        ends = np.cumsum(sizes + 1)
        super().__init__(Documents(np.zeros(0, np.int32), ends), length, np.zeros(1, np.int32), "drop")
        self._preferences = preferences

    def _blank(self, rows: int) -> Batch:
        whole = {
            name: np.zeros((rows, self._length), np.int32) for name in ("tokens_BT", "positions_BT", "segments_BT")
        }
        whole |= {"pairs_BT": np.zeros((rows, self._length), np.int32)}
        return whole | {n: np.zeros((rows, self._length), np.float32) for n in ("ends_BT", "values_BT", "weights_BT")}

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
