"""Packs documents into rows of fixed length; segments keep attention within a document.

Text is cut at the end of a row without losing targets. Conversations are not cut (see `UncutRows`).

A document of n ids is n - 1 pairs of an id and the next one. The pairs, not the ids, are concatenated and cut at the
ends of rows: the last id of a row still has its target, and the document continues in the next row as a new segment.
So no target needs masking; only the padding after the last document has weight 0.

    B rows of a batch    T positions of a row
"""

import abc
import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dsv2_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Documents(NamedTuple):
    """The concatenated token ids of all documents, int32, and the end of each document, int64.

    learnt bool: which ids are targets; None for all but the first of each document.
    """

    ids: np.ndarray
    ends: np.ndarray
    learnt: np.ndarray | None = None


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a document, int32: begin of sequence, text, end of sequence."""
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)


def join(documents: Iterable[np.ndarray]) -> Documents:
    """Concatenates documents of at least two ids each, in memory."""
    listed = list(documents)
    ends = np.cumsum([len(ids) for ids in listed], dtype=np.int64)
    return Documents(np.concatenate(listed) if listed else np.zeros(0, np.int32), ends)


def blank_batch(rows: int, length: int) -> Batch:
    """A batch of padding: int32 tokens, targets, positions, segments and bytes, float32 weights, each `<name>_BT`.

    segments_BT numbers a row's documents from 1; 0 is padding. positions_BT counts from 0 in each segment. weights_BT
    is a target's weight in the loss, mostly 1. bytes_BT is the length of a target's text in UTF-8.
    """
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT", "bytes_BT")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"weights_BT": np.zeros((rows, length), np.float32)}


def write_segment(
    batch: Batch,
    place: tuple[int, int],
    segment: int,
    ids: np.ndarray,
    bytes_per_token: np.ndarray,
    weights: np.ndarray | float,
) -> None:
    """Writes n + 1 ids as n pairs into a blank batch, starting at (row, position); weights [n] are the targets'."""
    row, at = place
    here, count = (row, slice(at, at + len(ids) - 1)), len(ids) - 1
    batch["tokens_BT"][here] = ids[:-1]
    batch["targets_BT"][here] = ids[1:]
    batch["positions_BT"][here] = np.arange(count)
    batch["segments_BT"][here] = segment
    batch["bytes_BT"][here] = bytes_per_token[ids[1:]]
    batch["weights_BT"][here] = weights


class PackedRows(abc.ABC):
    """Random access to rows of packed documents; a row may end in padding.

    too_long: the number of documents that were longer than a row and therefore dropped or cut.
    """

    too_long = 0

    def __init__(self, length: int) -> None:
        self._length = length

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def fill(self, batch: Batch, row: int, index: int) -> None:
        """Writes row `index` into row `row` of a blank batch."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of these rows; a negative index gives a row of padding."""
        batch = self._blank(len(indices))
        for row, index in enumerate(indices):
            if index >= 0:
                self.fill(batch, row, int(index))
        return batch

    def batches(
        self, rows: int, indices: np.ndarray | None = None, mine: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Batches of `rows` rows, all or those of `indices`, in order; the last one ends in padding.

        mine: the rows of each batch to return; None for all.
        """
        wanted = np.arange(len(self)) if indices is None else indices
        wanted = np.concatenate([wanted, np.full(-len(wanted) % rows, -1)]).reshape(-1, rows)
        for chosen in wanted if mine is None else wanted[:, mine]:
            yield self.batch(chosen)

    def _blank(self, rows: int) -> Batch:
        return blank_batch(rows, self._length)


class Mixed(PackedRows):
    """The rows of two sources of equal row length, concatenated."""

    def __init__(self, first: PackedRows, second: PackedRows) -> None:
        super().__init__(first._length)
        self._first, self._second = first, second
        self.too_long = first.too_long + second.too_long

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def fill(self, batch: Batch, row: int, index: int) -> None:
        rest = index - len(self._first)
        (self._first if rest < 0 else self._second).fill(batch, row, index if rest < 0 else rest)


class DocumentRows(PackedRows):
    """PackedRows of tokenised documents."""

    def __init__(self, documents: Documents, length: int, bytes_per_token: np.ndarray) -> None:
        """bytes_per_token int [vocabulary]: the UTF-8 bytes of each id's text."""
        super().__init__(length)
        self._documents, self._bytes = documents, bytes_per_token

    @abc.abstractmethod
    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """The contents of a row in order: (index of the first id, number of pairs)."""

    def fill(self, batch: Batch, row: int, index: int) -> None:
        ids, learnt = self._documents.ids, self._documents.learnt
        at = 0
        for segment, (start, count) in enumerate(self._pieces(index), 1):
            run, targets = slice(start, start + count + 1), slice(start + 1, start + count + 1)
            weights = 1 if learnt is None else learnt[targets]
            write_segment(batch, (row, at), segment, ids[run], self._bytes, weights)
            at += count


class CutRows(DocumentRows):
    """PackedRows in which only the last row has padding: a document that does not fit continues in the next row."""

    def __init__(self, documents: Documents, length: int, bytes_per_token: np.ndarray) -> None:
        super().__init__(documents, length, bytes_per_token)
        # A document has one pair less than ids, so d documents have d pairs less.
        self._pairs_before = np.concatenate([[0], documents.ends - np.arange(1, len(documents.ends) + 1)])

    def __len__(self) -> int:
        return -(-int(self._pairs_before[-1]) // self._length)

    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        pair, left = index * self._length, self._length
        document = int(np.searchsorted(self._pairs_before, pair, side="right")) - 1
        while left and document < len(self._documents.ends):
            count = min(int(self._pairs_before[document + 1]) - pair, left)
            yield pair + document, count  # the last id of each earlier document starts no pair
            pair, left, document = pair + count, left - count, document + 1


class UncutRows(DocumentRows):
    """PackedRows of uncut documents by best fit: longest first, each into the fullest row that it fits in.

    A document longer than a row is dropped or cut to the row's length, as `too_long` says. Cut documents without a
    target are dropped.
    """

    def __init__(
        self, documents: Documents, length: int, bytes_per_token: np.ndarray, too_long: Literal["drop", "cut"]
    ) -> None:
        super().__init__(documents, length, bytes_per_token)
        ends = documents.ends
        self._starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self._counts = ends - self._starts - 1
        over = self._counts > length
        self.too_long = int(over.sum())
        self._counts = np.minimum(self._counts, length)
        keep = ~over if too_long == "drop" else np.array([self._learns(d) for d in range(len(ends))], bool)
        self._rows: list[list[int]] = []
        rows_by_free: list[list[int]] = [[] for _ in range(length + 1)]  # rows by their number of free positions
        sizes: list[int] = []  # the numbers of free positions that some row has, ascending
        for document in np.argsort(-self._counts, kind="stable"):
            count = int(self._counts[document])
            if not keep[document]:
                continue
            at = bisect.bisect_left(sizes, count)
            free = sizes[at] if at < len(sizes) else length
            if at < len(sizes):
                row = rows_by_free[free].pop()
                if not rows_by_free[free]:
                    sizes.pop(at)
            else:
                row = len(self._rows)
                self._rows.append([])
            self._rows[row].append(int(document))
            if not rows_by_free[free - count]:
                bisect.insort(sizes, free - count)
            rows_by_free[free - count].append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def _learns(self, document: int) -> bool:
        start, learnt = self._starts[document], self._documents.learnt
        return learnt is None or bool(learnt[start + 1 : start + 1 + self._counts[document]].any())

    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        for document in self._rows[index]:
            yield int(self._starts[document]), int(self._counts[document])
