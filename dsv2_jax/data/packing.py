"""Documents to rows of fixed length, in which no position looks into another document and no target is lost.

A document of n ids is n - 1 pairs of an id and the one after it. The pairs, not the ids, are laid end to end and cut
at the rows' borders: the last id before a border still has its target, and the document goes on in the next row as a
new segment. So nothing needs masking at a seam; only the padding behind the last document has weight 0.

    B rows of a batch    T positions of a row
"""

from collections.abc import Callable

import numpy as np

from dsv2_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A document as the model reads it, int32: begin, text, end."""
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)


def blank_batch(rows: int, length: int) -> Batch:
    """A batch of nothing but padding: `tokens_BT`, `targets_BT`, `positions_BT`, `segments_BT` int32 and `weights_BT`
    float32. Segments count a row's documents from 1, and 0 is padding; positions count from 0 in each segment; the
    weight is 1 where a target counts."""
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    batch = {name: np.zeros((rows, length), np.int32) for name in names}
    return batch | {"weights_BT": np.zeros((rows, length), np.float32)}


class Lane:
    """Reads documents first, first + stride, ... one after another into rows.

    Its place is two numbers, the document and how many of its pairs are used, from which it goes on exactly.
    """

    def __init__(self, documents: Callable[[int], np.ndarray | None], first: int = 0, stride: int = 1) -> None:
        """`documents` gives the ids of a document by number, and None behind the last."""
        self._documents, self._stride = documents, stride
        self.place = (first, 0)

    @property
    def place(self) -> tuple[int, int]:
        """The document being read, and how many of its pairs are used."""
        return self._document, self._used

    @place.setter
    def place(self, place: tuple[int, int]) -> None:
        self._document, self._used = place
        self._ids: np.ndarray | None = None  # of the document being read, once it was looked at

    def fill(self, batch: Batch, row: int) -> bool:
        """Writes the next row of a blank batch. Returns False when no document is left to write anything of."""
        length, at, segment = batch["tokens_BT"].shape[1], 0, 0
        while at < length:
            if self._ids is None:
                self._ids = self._documents(self._document)
                if self._ids is None:
                    break
            start = self._used
            count = min(len(self._ids) - 1 - start, length - at)
            segment += 1
            here = (row, slice(at, at + count))
            batch["tokens_BT"][here] = self._ids[start : start + count]
            batch["targets_BT"][here] = self._ids[start + 1 : start + count + 1]
            batch["positions_BT"][here] = np.arange(count)
            batch["segments_BT"][here] = segment
            batch["weights_BT"][here] = 1
            at, self._used = at + count, start + count
            if self._used == len(self._ids) - 1:
                self.place = (self._document + self._stride, 0)
        return at > 0
