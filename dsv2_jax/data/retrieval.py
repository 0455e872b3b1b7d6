"""Rows to learn looking things up from: pieces of a corpus with a fact in them, and a question about it behind.

Facts and questions are those of `data/facts.py`. A row is computed from its index when it is read, so it is always the
same.
"""

import random

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data.facts import LANGUAGES
from dsv2_jax.data.packing import Batch, PackedRows, write_segment
from dsv2_jax.data.tokenizer import Tokenizer


class RetrievalRows(PackedRows):
    """Rows of whole documents, of any length that fits, short ones more often than long.

    A fact stands somewhere in a document, and is asked for and answered at its end. A single fact, and often little
    else: what is looked up first is anything above, and that must be worth something for more to be learnt.
    """

    def __init__(self, text: np.ndarray, tokenizer: Tokenizer, length: int, *, count: int, weight: float) -> None:
        """text int [N]: ids to hide facts in. count: of rows. weight: of an answer's tokens in the loss.

        Raises ValueError if a row has no room for a fact and its question.
        """
        super().__init__(length)
        self._text, self._tokenizer, self._count, self._weight = text, tokenizer, count, weight
        shortest = len(self._document(random.Random(0), 0)[0]) - 1
        check(shortest <= length, f"a row of {length} tokens (batch.length) has no room for a fact and its question")

    def __len__(self) -> int:
        return self._count

    def fill(self, batch: Batch, row: int, index: int) -> None:
        """Documents, each of some of the room that is left, until there is none for another."""
        draw, at, segment = random.Random(f"retrieval {index}"), 0, 1
        while True:
            room = self._length - at
            ids, answers = self._document(draw, room)
            if len(ids) - 1 > room:
                return
            weights = np.where(answers[1:], self._weight, 1.0)
            write_segment(batch, (row, at), segment, ids, self._tokenizer.bytes_per_token, weights)
            at, segment = at + len(ids) - 1, segment + 1

    def _document(self, draw: random.Random, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n], and which of them answer, bool [n]: at most `room` pairs, or as many as the fact needs."""
        encode, phrases = self._tokenizer.encode, LANGUAGES[draw.choice(sorted(LANGUAGES))]
        place, word = draw.choice(phrases.places), draw.choice(phrases.secrets)
        fact = encode(phrases.needle.format(place=place, word=word))
        question, answer = encode(phrases.question.format(place=place)), encode(f" {word}\n")
        most = min(room - len(fact) - len(question) - len(answer), len(self._text))
        hay = int(max(0, most) ** draw.random())
        start = draw.randint(0, len(self._text) - hay)
        special = (self._tokenizer.bos_id, self._tokenizer.eos_id)
        text = [i for i in self._text[start : start + hay].tolist() if i not in special]
        at = draw.randint(0, len(text))
        ids = [self._tokenizer.bos_id, *text[:at], *fact, *text[at:], *question, *answer]
        return np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - len(answer)
