"""Batches out: an endless, resumable stream for training, and finite ones for evaluation.

Every row of the training batch is a lane of its own through the shuffled documents: row r reads documents r, r + R,
r + 2R, ... of the endless sequence of epochs, R being the rows of the whole micro-batch. So a process tokenises only
the documents of its own rows, the global batch is the same however many processes share it, and a long document
spreads over steps instead of filling a batch. grain shuffles, repeats and reads; its own packing keeps tuples in its
state, which do not survive JSON, and would have each process pack every row.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import grain

from dsv2_jax.config import Config, check
from dsv2_jax.data.corpora import Corpus
from dsv2_jax.data.packing import Batch, Lane, blank_batch, document_ids
from dsv2_jax.data.tokenizer import Tokenizer


def train_batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """Micro-batches without end: this process's rows of them (see `packing.blank_batch` for the arrays).

    The order depends on `config.seed`, the corpus, the tokenizer, the rows and the length of a micro-batch alone, and
    changes with each epoch. Raises ValueError when the rows do not divide among the processes.
    """
    rows = config.batch.micro_size or config.batch.size
    check(
        rows % process_count == 0,
        f"batch.micro_size ({rows}) must be a multiple of the number of processes ({process_count})",
    )
    documents = (
        grain.MapDataset.source(corpus.train)
        .seed(config.seed)
        .shuffle()
        .repeat()
        .map(lambda example: document_ids(tokenizer, example["text"].decode()))
    )
    share = rows // process_count
    mine = range(process_index * share, (process_index + 1) * share)
    order = {"corpus": corpus.digest, "seed": config.seed, "rows": rows}
    return _TrainBatches(documents, mine, config.batch.length, order)


class _TrainBatches(grain.DatasetIterator[Batch]):
    """Holds the lanes of this process. Its state is JSON: the facts that fix the order, and each lane's place."""

    def __init__(self, documents: grain.MapDataset, mine: range, length: int, order: dict[str, Any]) -> None:
        super().__init__()
        self._lanes = {row: Lane(documents.__getitem__, first=row, stride=order["rows"]) for row in mine}
        self._length, self._order = length, order

    def __next__(self) -> Batch:
        batch = blank_batch(len(self._lanes), self._length)
        for row, lane in enumerate(self._lanes.values()):
            lane.fill(batch, row)
        return batch

    def get_state(self) -> dict[str, Any]:
        """States of the processes of a run differ in `lanes` only; their union serves any other number of them."""
        return {**self._order, "lanes": {str(row): list(lane.place) for row, lane in self._lanes.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another corpus, seed or batch, or without one of this process's rows."""
        for name, value in self._order.items():
            check(
                state.get(name) == value,
                f"the saved place in the data is of {name} {state.get(name)!r}, and this run has {value!r}",
            )
        lanes = state["lanes"]
        missing = [row for row in self._lanes if str(row) not in lanes]
        check(not missing, f"the saved place in the data lacks rows {missing}: it is of another process")
        for row, lane in self._lanes.items():
            document, used = lanes[str(row)]
            lane.place = (document, used)


def held_out_batches(
    config: Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The held-out split once, in a fixed order, `length` (else `config.batch.length`) positions a row.

    With a limit, at most so many batches: then no document gives more pairs than its equal share (but a row at least),
    so that a short evaluation still sees every kind of text. The last batch is filled up with padding.
    """
    length = length or config.batch.length
    source = corpus.held_out
    most = max(length, limit * rows * length // len(source)) if limit else None

    def ids(number: int) -> Any:
        if number == len(source):
            return None
        whole = document_ids(tokenizer, source[number]["text"].decode())
        return whole[: most + 1] if most else whole

    return _finite(Lane(ids), rows, length, limit)


def batches_of_text(texts: Iterable[str], tokenizer: Tokenizer, rows: int, length: int) -> Iterator[Batch]:
    """Every text as a document, in order, each batch [rows, length]; the last one is filled up with padding."""
    listed = list(texts)
    lane = Lane(lambda number: document_ids(tokenizer, listed[number]) if number < len(listed) else None)
    return _finite(lane, rows, length, None)


def _finite(lane: Lane, rows: int, length: int, limit: int | None) -> Iterator[Batch]:
    made = 0
    while limit is None or made < limit:
        batch = blank_batch(rows, length)
        written = [lane.fill(batch, row) for row in range(rows)]
        if not any(written):
            return
        yield batch
        made += 1
