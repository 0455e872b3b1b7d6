"""PackedRows that train retrieval: pieces of a corpus with a fact inside and a question about it at the end.

Facts and questions are those of `facts.py`. A row is a function of its index, computed when it is read.
"""

import random

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data.facts import LANGUAGES
from dsv2_jax.data.packing import Batch, PackedRows, write_segment
from dsv2_jax.data.tokenizer import Tokenizer


class RetrievalRows(PackedRows):
    """PackedRows of uncut documents of random lengths, short ones more often than long ones.

    Each document has one fact at a random position, and ends with a question about it and the answer. Short documents
    make learning easier: a model first learns to copy any word of the context, which in a short document is often the
    right one.
    """

    def __init__(self, text: np.ndarray, tokenizer: Tokenizer, length: int, *, count: int, weight: float) -> None:
        """text int [N]: ids of the text around the facts. count: of rows. weight: of an answer's tokens in the loss.

        Raises ValueError if a row is too short for a fact and its question.
        """
        super().__init__(length)
        self._text, self._tokenizer, self._count, self._weight = text, tokenizer, count, weight
        shortest = len(self._document(random.Random(0), 0)[0]) - 1
        check(shortest <= length, f"a row of {length} tokens (batch.length) is too short for a fact and its question")

    def __len__(self) -> int:
        return self._count

    def fill(self, batch: Batch, row: int, index: int) -> None:
        """Adds documents of random lengths until the next one does not fit."""
        draw, at, segment = random.Random(f"retrieval {index}"), 0, 1
        while True:
            free = self._length - at
            ids, answers = self._document(draw, free)
            if len(ids) - 1 > free:
                return
            weights = np.where(answers[1:], self._weight, 1.0)
            write_segment(batch, (row, at), segment, ids, self._tokenizer.bytes_per_token, weights)
            at, segment = at + len(ids) - 1, segment + 1

    def _document(self, draw: random.Random, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], the mask of the answer bool [n]), with at most `limit` pairs unless the fact needs more."""
        encode, phrases = self._tokenizer.encode, LANGUAGES[draw.choice(sorted(LANGUAGES))]
        place, word = draw.choice(phrases.places), draw.choice(phrases.secrets)
        fact = encode(phrases.needle.format(place=place, word=word))
        question, answer = encode(phrases.question.format(place=place)), encode(f" {word}\n")
        most = min(limit - len(fact) - len(question) - len(answer), len(self._text))
        hay = int(max(0, most) ** draw.random())
        start = draw.randint(0, len(self._text) - hay)
        special = (self._tokenizer.bos_id, self._tokenizer.eos_id)
        text = [i for i in self._text[start : start + hay].tolist() if i not in special]
        at = draw.randint(0, len(text))
        ids = [self._tokenizer.bos_id, *text[:at], *fact, *text[at:], *question, *answer]
        return np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - len(answer)
