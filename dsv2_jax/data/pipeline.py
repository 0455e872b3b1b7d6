"""Batches out: an endless, resumable stream for training, and finite ones for evaluation.

A corpus is tokenised once and kept on disk, so that any row of it can be read at any time. grain shuffles the rows'
numbers anew each epoch; what a step reads follows from its number alone, so the whole state is a number, the same for
every process, and a batch never holds neighbouring rows of one document but by chance.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import rich.console
import rich.progress

from dsv2_jax.config import Config, check
from dsv2_jax.data.corpora import Corpus, Source, published
from dsv2_jax.data.packing import Batch, Documents, Rows, document_ids, join
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
    packed = Rows(tokenised(corpus, "train", tokenizer), config.batch.length)
    numbers = grain.MapDataset.range(len(packed)).seed(config.seed).shuffle().repeat().batch(rows)
    share = rows // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    batches = numbers.map(lambda indices: packed.batch(indices[mine], share))
    order = {"corpus": corpus.digest, "seed": config.seed, "rows": rows, "length": config.batch.length}
    return _TrainBatches(batches, order)


class _TrainBatches(grain.DatasetIterator[Batch]):
    """Counts batches. Its state is JSON: the number of the next one, and the facts that fix their order."""

    def __init__(self, batches: grain.MapDataset[Batch], order: dict[str, Any]) -> None:
        super().__init__()
        self._batches, self._order, self._next = batches, order, 0

    def __next__(self) -> Batch:
        batch: Any = self._batches[self._next]
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The same in every process of a run, and good for any other number of them."""
        return {**self._order, "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another corpus, seed or batch."""
        for name, value in self._order.items():
            check(
                state.get(name) == value,
                f"the saved place in the data is of {name} {state.get(name)!r}, and this run has {value!r}",
            )
        self._next = state["next"]


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

    With a limit, only so many batches, of rows spread evenly over the split. The last batch is filled up with padding.
    """
    packed = Rows(tokenised(corpus, "held_out", tokenizer), length or config.batch.length)
    count = min(limit * rows, len(packed)) if limit else len(packed)
    return packed.batches(rows, np.arange(count) * len(packed) // count)


def batches_of_text(texts: Iterable[str], tokenizer: Tokenizer, rows: int, length: int) -> Iterator[Batch]:
    """Every text as a document, in order, each batch [rows, length]; the last one is filled up with padding."""
    return Rows(join(document_ids(tokenizer, text) for text in texts), length).batches(rows)


def tokenised(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Documents:
    """The documents of a split, `train` or `held_out`, tokenised once and mapped from files beside the corpus."""
    folder = corpus.folder / f"{split}-{hashlib.blake2b(tokenizer.identity.encode(), digest_size=8).hexdigest()}"
    if not folder.exists():
        with published(folder) as scratch:
            _tokenise(getattr(corpus, split), tokenizer, scratch)
    ids = np.memmap(folder / "ids.int32", np.int32, mode="r")
    return Documents(ids, np.load(folder / "ends.npy"))


def _tokenise(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    console = rich.console.Console(stderr=True)
    numbers = rich.progress.track(
        range(len(source)), "tokenising", console=console, disable=not console.is_terminal, transient=True
    )
    ends, end = np.zeros(len(source), np.int64), 0
    with (folder / "ids.int32").open("wb") as file:
        for number in numbers:
            ids = document_ids(tokenizer, source[number]["text"].decode())
            file.write(ids.tobytes())
            end += len(ids)
            ends[number] = end
    np.save(folder / "ends.npy", ends)
