"""Rows to learn looking things up from: pieces of a corpus with facts in them, and questions about these behind.

They are worded as the needles of `evaluation/needle.py` are, so a model that has read them has practised that test; its
numbers and haystacks it has not seen. A row is made when it is read: of its number alone, so always the same.
"""

import random

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data.packing import Batch, Rows, write_segment
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.evaluation.needle import LANGUAGES

_MOST_FACTS = 4


class RetrievalRows(Rows):
    """Rows of whole documents, of any length that fits, short ones more often than long.

    In the middle of a document stands a fact, or up to four, at its end the questions and answers, in another order.
    Short documents with a single fact are where looking up begins to be learnt: any attention to it helps.
    """

    def __init__(self, text: np.ndarray, tokenizer: Tokenizer, length: int, count: int, weight: float) -> None:
        """text int [N]: ids to hide facts in. count: of rows. weight: of an answer's tokens in the loss.

        Raises ValueError if a row has no room for a fact and its question.
        """
        super().__init__(length)
        self._text, self._tokenizer, self._count, self._weight = text, tokenizer, count, weight
        shortest = len(self._document(random.Random(0), 0, 1)[0]) - 1
        check(shortest <= length, f"a row of {length} tokens (batch.length) has no room for a fact and its question")

    def __len__(self) -> int:
        return self._count

    def fill(self, batch: Batch, row: int, index: int) -> None:
        """Documents, each of some of the room that is left, until there is none for another."""
        draw, at, segment, most = random.Random(f"retrieval {index}"), 0, 1, _MOST_FACTS
        while most:
            room = self._length - at
            facts = draw.choice((1, draw.randint(1, most)))
            ids, answers = self._document(draw, int(room ** draw.random()), facts)
            if len(ids) - 1 > room:
                most = facts - 1
                continue
            weights = np.where(answers[1:], self._weight, 1.0)
            write_segment(batch, (row, at), segment, ids, self._tokenizer.bytes_per_token, weights)
            at, segment = at + len(ids) - 1, segment + 1

    def _document(self, draw: random.Random, size: int, facts: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n], and which of them answer, bool [n]: of about `size` pairs, or as many as its facts need."""
        encode, phrases = self._tokenizer.encode, LANGUAGES[draw.choice(sorted(LANGUAGES))]
        told = [(p, "".join(draw.choices("0123456789", k=4))) for p in draw.sample(phrases.places, facts)]
        needles = [encode(phrases.needle.format(place=place, number=number)) for place, number in told]
        draw.shuffle(told)
        asked = [(encode(phrases.question.format(place=place)), encode(f" {number}\n")) for place, number in told]
        needed = 1 + sum(map(len, needles)) + sum(len(question) + len(answer) for question, answer in asked)
        hay = max(0, min(size + 1 - needed, len(self._text)))
        start = draw.randint(0, len(self._text) - hay)
        special = (self._tokenizer.bos_id, self._tokenizer.eos_id)
        ids = [i for i in self._text[start : start + hay].tolist() if i not in special]
        places = sorted((draw.randint(0, len(ids)) for _ in needles), reverse=True)
        for at, needle in zip(places, needles, strict=True):  # from behind: none falls into another
            ids[at:at] = needle
        ids.insert(0, self._tokenizer.bos_id)
        answers = [False] * len(ids)
        for question, answer in asked:
            ids += question + answer
            answers += [False] * len(question) + [True] * len(answer)
        return np.array(ids, np.int32), np.array(answers, bool)
