"""Documents to rows of fixed length, in which no position looks into another document.

Text is cut where a row ends, and no target is lost; conversations stand whole in a row (see `WholeRows`).

A document of n ids is n - 1 pairs of an id and the one after it. The pairs, not the ids, are laid end to end and cut
at the rows' borders: the last id before a border still has its target, and the document goes on in the next row as a
new segment. So nothing needs masking at a seam; only the padding behind the last document has weight 0.

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
    """Token ids of all documents, int32, one behind the other, and where each one ends, int64.

    learnt bool: which ids count as targets; None: all that follow another.
    """

    ids: np.ndarray
    ends: np.ndarray
    learnt: np.ndarray | None = None


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
    segment; the weight is what a target counts, mostly 1, and bytes are those of UTF-8 text that it stands for."""
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
    """Writes n + 1 ids as n pairs into a blank batch, from (row, position) on; weights [n]: of the targets."""
    row, at = place
    here, count = (row, slice(at, at + len(ids) - 1)), len(ids) - 1
    batch["tokens_BT"][here] = ids[:-1]
    batch["targets_BT"][here] = ids[1:]
    batch["positions_BT"][here] = np.arange(count)
    batch["segments_BT"][here] = segment
    batch["bytes_BT"][here] = bytes_per_token[ids[1:]]
    batch["weights_BT"][here] = weights


class PackedRows(abc.ABC):
    """Rows of documents, any of them in any order; a row may end in padding.

    too_long: documents that were longer than a row, and were dropped or cut for it.
    """

    too_long = 0

    def __init__(self, length: int) -> None:
        self._length = length

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def fill(self, batch: Batch, row: int, index: int) -> None:
        """Writes row `index` to that row of a blank batch."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """A batch of these rows; padding where the index is negative."""
        batch = self._blank(len(indices))
        for row, index in enumerate(indices):
            if index >= 0:
                self.fill(batch, row, int(index))
        return batch

    def batches(
        self, rows: int, indices: np.ndarray | None = None, mine: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[Batch]:
        """These rows, or all, in order, `rows` a batch, of which the places `mine`; the last ends in padding."""
        wanted = np.arange(len(self)) if indices is None else indices
        wanted = np.concatenate([wanted, np.full(-len(wanted) % rows, -1)]).reshape(-1, rows)
        for chosen in wanted if mine is None else wanted[:, mine]:
            yield self.batch(chosen)

    def _blank(self, rows: int) -> Batch:
        return blank_batch(rows, self._length)


class Mixed(PackedRows):
    """The rows of both, which are of one length, one behind the other."""

    def __init__(self, first: PackedRows, second: PackedRows) -> None:
        super().__init__(first._length)
        self._first, self._second = first, second
        self.too_long = first.too_long + second.too_long

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def fill(self, batch: Batch, row: int, index: int) -> None:
        behind = index - len(self._first)
        (self._first if behind < 0 else self._second).fill(batch, row, index if behind < 0 else behind)


class DocumentRows(PackedRows):
    """Rows of documents that are there already."""

    def __init__(self, documents: Documents, length: int, bytes_per_token: np.ndarray) -> None:
        """bytes_per_token int [vocabulary]: the bytes of text of each id."""
        super().__init__(length)
        self._documents, self._bytes = documents, bytes_per_token

    @abc.abstractmethod
    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """What stands in a row: (the first id of a run of pairs, how many pairs), one after the other."""

    def fill(self, batch: Batch, row: int, index: int) -> None:
        ids, learnt = self._documents.ids, self._documents.learnt
        at = 0
        for segment, (start, count) in enumerate(self._pieces(index), 1):
            run, targets = slice(start, start + count + 1), slice(start + 1, start + count + 1)
            weights = 1 if learnt is None else learnt[targets]
            write_segment(batch, (row, at), segment, ids[run], self._bytes, weights)
            at += count


class CutRows(DocumentRows):
    """Rows without gaps: a document goes on in the next row where one ends. The last may end in padding."""

    def __init__(self, documents: Documents, length: int, bytes_per_token: np.ndarray) -> None:
        super().__init__(documents, length, bytes_per_token)
        # Document d has one pair less than ids, so the pairs before it are the ids before it less d.
        self._pairs_before = np.concatenate([[0], documents.ends - np.arange(1, len(documents.ends) + 1)])

    def __len__(self) -> int:
        return -(-int(self._pairs_before[-1]) // self._length)

    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        pair, left = index * self._length, self._length
        document = int(np.searchsorted(self._pairs_before, pair, side="right")) - 1
        while left and document < len(self._documents.ends):
            count = min(int(self._pairs_before[document + 1]) - pair, left)
            yield pair + document, count  # each document before this one has an id that begins no pair
            pair, left, document = pair + count, left - count, document + 1


class WholeRows(DocumentRows):
    """Rows of whole documents, longest first, each in the fullest row that has room for it.

    A document that is longer than a row is dropped or cut to its length, by `too_long`; so is one that then has
    nothing to learn.
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
        with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that they have left
        rooms: list[int] = []  # of which there are any, rising
        for document in np.argsort(-self._counts, kind="stable"):
            count = int(self._counts[document])
            if not keep[document]:
                continue
            at = bisect.bisect_left(rooms, count)
            room = rooms[at] if at < len(rooms) else length
            if at < len(rooms):
                row = with_room[room].pop()
                if not with_room[room]:
                    rooms.pop(at)
            else:
                row = len(self._rows)
                self._rows.append([])
            self._rows[row].append(int(document))
            if not with_room[room - count]:
                bisect.insort(rooms, room - count)
            with_room[room - count].append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def _learns(self, document: int) -> bool:
        start, learnt = self._starts[document], self._documents.learnt
        return learnt is None or bool(learnt[start + 1 : start + 1 + self._counts[document]].any())

    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        for document in self._rows[index]:
            yield int(self._starts[document]), int(self._counts[document])
