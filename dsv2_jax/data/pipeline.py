"""Batches: an endless, resumable iterator for training, and finite ones for evaluation.

A corpus is tokenised once and stored on disk, which gives random access to its rows. grain shuffles the row indices in
each epoch. A batch depends only on its index, so the iterator's state is one number, equal in every process.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import rich.console
import rich.progress

from dsv2_jax.config import Config, check
from dsv2_jax.data import retrieval
from dsv2_jax.data.corpora import Corpus, Source, published, texts_of
from dsv2_jax.data.forms import FORMS, Form
from dsv2_jax.data.packing import Batch, CutRows, Documents, Mixed, PackedRows, UncutRows, document_ids, join
from dsv2_jax.data.tokenizer import Tokenizer


def train_batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, *, mine: Sequence[int] | np.ndarray | None = None
) -> "TrainBatches":
    """An endless iterator of micro-batches (leaves as in `blank_batch`): all rows of each, or the rows `mine`.

    The order depends only on `config.seed`, the corpus, the tokenizer, and the rows and length of a micro-batch; it
    differs between epochs.
    """
    rows = config.batch.micro_size or config.batch.size
    packed = packed_rows(config, corpus, "train", tokenizer, config.batch.length)
    numbers = grain.MapDataset.range(len(packed)).seed(config.seed).shuffle().repeat().batch(rows)
    places = np.arange(rows) if mine is None else np.asarray(mine)
    batches = numbers.map(lambda indices: packed.batch(indices[places]))
    order = {"corpus": corpus.digest, "seed": config.seed, "rows": rows, "length": config.batch.length}
    left_out = packed.too_long
    return TrainBatches(batches, order, epoch_tokens=len(packed) * config.batch.length, left_out=left_out)


def packed_rows(config: Config, corpus: Corpus, split: str, tokenizer: Tokenizer, length: int) -> PackedRows:
    """The rows of a split, `train` or `held_out`, packed as the form of the data says (`FORMS`).

    Training rows of text may include retrieval rows (`data.retrieval_share`). Raises ValueError if no document of a
    form that is not cut fits in a row.
    """
    form = FORMS[corpus.form]
    if form.rows is not None:
        return form.rows(texts_of(getattr(corpus, split)), tokenizer, length)
    documents = tokenised(corpus, split, tokenizer)
    if form.cut:
        text, data = CutRows(documents, length, tokenizer.bytes_per_token), config.data
        if split == "held_out" or not data.retrieval_share:
            return text
        lookups = retrieval.RetrievalRows(
            documents.ids,
            tokenizer,
            length,
            count=math.ceil(len(text) * data.retrieval_share / (1 - data.retrieval_share)),
            weight=data.retrieval_weight,
        )
        return Mixed(text, lookups)
    rows = UncutRows(documents, length, tokenizer.bytes_per_token, config.data.too_long)
    check(
        len(rows) > 0, f"none of the {corpus.form} ({split} split) fits in the {length} tokens of a row (batch.length)"
    )
    return rows


class TrainBatches(grain.DatasetIterator[Batch]):
    """An iterator of batches with a JSON state: the index of the next batch, and the settings that fix the order.

    epoch_tokens: rows x length of one epoch. left_out: the number of conversations or preferences too long for a row.
    """

    def __init__(
        self, batches: grain.MapDataset[Batch], order: dict[str, Any], *, epoch_tokens: int, left_out: int
    ) -> None:
        super().__init__()
        self.epoch_tokens, self.left_out = epoch_tokens, left_out
        self._batches, self._order, self._next = batches, order, 0

    def __next__(self) -> Batch:
        batch: Any = self._batches[self._next]
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state, equal in every process and valid for any number of processes."""
        return {**self._order, "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another corpus, seed or batch."""
        for name, value in self._order.items():
            check(
                state.get(name) == value,
                f"the saved position in the data is for {name} {state.get(name)!r}, and this run has {value!r}",
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
    mine: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """One pass over the held-out split in a fixed order; rows have `length` or `config.batch.length` positions.

    limit: the number of batches, whose rows are evenly spaced over the split; None for all. The last batch ends in
    padding. mine: the rows of each batch to return; None for all.
    """
    packed = packed_rows(config, corpus, "held_out", tokenizer, length or config.batch.length)
    count = min(limit * rows, len(packed)) if limit else len(packed)
    return packed.batches(rows, np.arange(count) * len(packed) // count, mine)


def batches_of_text(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    rows: int,
    length: int,
    mine: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Batches [rows, length] of the texts, one document each, in order; the last batch ends in padding.

    mine: the rows of each batch to return; None for all.
    """
    documents = join(document_ids(tokenizer, text) for text in texts)
    return CutRows(documents, length, tokenizer.bytes_per_token).batches(rows, mine=mine)


def tokenised(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Documents:
    """The documents of a split, `train` or `held_out`, tokenised once and memory-mapped from the corpus folder."""
    form = FORMS[corpus.form]
    key = tokenizer.identity + (tokenizer.template.source if form.templated else "")
    folder = corpus.folder / f"{split}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    if not folder.exists():
        with published(folder) as scratch:
            _tokenise(getattr(corpus, split), tokenizer, form, scratch)
    ids = np.memmap(folder / "ids.int32", np.int32, mode="r")
    learnt = None if form.cut else np.memmap(folder / "learnt.bool", bool, mode="r")
    return Documents(ids, np.load(folder / "ends.npy"), learnt)


def _tokenise(source: Source, tokenizer: Tokenizer, form: Form, folder: Path) -> None:
    console = rich.console.Console(stderr=True)
    numbers = rich.progress.track(
        range(len(source)), "tokenising", console=console, disable=not console.is_terminal, transient=True
    )
    ends, end = np.zeros(len(source), np.int64), 0
    with (folder / "ids.int32").open("wb") as file, (folder / "learnt.bool").open("wb") as learnt:
        for number in numbers:
            encoded = form.encode(source[number]["text"].decode(), tokenizer)
            file.write(encoded.ids.tobytes())
            learnt.write(b"" if form.cut else encoded.answers.tobytes())
            end += len(encoded.ids)
            ends[number] = end
    np.save(folder / "ends.npy", ends)
