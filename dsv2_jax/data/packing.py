"""Documents to rows of fixed length, in which no position looks into another document and no target is lost.

A document of n ids is n - 1 pairs of an id and the one after it. The pairs, not the ids, are laid end to end and cut
at the rows' borders: the last id before a border still has its target, and the document goes on in the next row as a
new segment. So nothing needs masking at a seam; only the padding behind the last document has weight 0.

    B rows of a batch    T positions of a row
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv2_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Documents(NamedTuple):
    """Token ids of all documents, int32, one behind the other, and where each one ends, int64."""

    ids: np.ndarray
    ends: np.ndarray


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A document as the model reads it, int32: begin, text, end."""
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)


def join(documents: Iterable[np.ndarray]) -> Documents:
    """Documents of at least two ids each, in memory."""
    listed = list(documents)
    ends = np.cumsum([len(ids) for ids in listed], dtype=np.int64)
    return Documents(np.concatenate(listed) if listed else np.zeros(0, np.int32), ends)


def blank_batch(rows: int, length: int) -> Batch:
    """A batch of nothing but padding: `tokens_BT`, `targets_BT`, `positions_BT`, `segments_BT`, `bytes_BT` int32 and
    `weights_BT` float32. Segments count a row's documents from 1, and 0 is padding; positions count from 0 in each
    segment; the weight is 1 where a target counts, and bytes are those of UTF-8 text that the target stands for."""
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT", "bytes_BT")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"weights_BT": np.zeros((rows, length), np.float32)}


class Rows:
    """The rows that documents make, any of them in any order; the last may end in padding."""

    def __init__(self, documents: Documents, length: int, bytes_per_token: np.ndarray) -> None:
        """bytes_per_token int [vocabulary]: the bytes of text of each id."""
        self._ids, self._ends, self._length = documents.ids, documents.ends, length
        self._bytes = bytes_per_token
        # Document d has one pair less than ids, so the pairs before it are the ids before it less d.
        self._pairs_before = np.concatenate([[0], documents.ends - np.arange(1, len(documents.ends) + 1)])

    def __len__(self) -> int:
        return -(-int(self._pairs_before[-1]) // self._length)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of these rows; padding where the index is negative."""
        batch = blank_batch(len(indices), self._length)
        for row, index in enumerate(indices):
            if index >= 0:
                self._fill(batch, row, int(index))
        return batch

    def batches(
        self, rows: int, indices: np.ndarray | None = None, mine: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[Batch]:
        """These rows, or all, in order, `rows` a batch, of which the places `mine`; the last ends in padding."""
        wanted = np.arange(len(self)) if indices is None else indices
        wanted = np.concatenate([wanted, np.full(-len(wanted) % rows, -1)]).reshape(-1, rows)
        for chosen in wanted if mine is None else wanted[:, mine]:
            yield self.batch(chosen)

    def _fill(self, batch: Batch, row: int, index: int) -> None:
        pair, at, segment = index * self._length, 0, 0
        document = int(np.searchsorted(self._pairs_before, pair, side="right")) - 1
        while at < self._length and document < len(self._ends):
            segment += 1
            count = min(int(self._pairs_before[document + 1]) - pair, self._length - at)
            start = pair + document  # each document before this one has an id that begins no pair
            here = (row, slice(at, at + count))
            batch["tokens_BT"][here] = self._ids[start : start + count]
            batch["targets_BT"][here] = self._ids[start + 1 : start + count + 1]
            batch["positions_BT"][here] = np.arange(count)
            batch["segments_BT"][here] = segment
            batch["bytes_BT"][here] = self._bytes[batch["targets_BT"][here]]
            batch["weights_BT"][here] = 1
            pair, at, document = pair + count, at + count, document + 1
