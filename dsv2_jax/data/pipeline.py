"""Batches out: an endless, resumable stream for training, and finite ones for evaluation.

A corpus is tokenised once and kept on disk, so that any row of it can be read at any time. grain shuffles the rows'
numbers anew each epoch; what a step reads follows from its number alone, so the whole state is a number, the same for
every process, and a batch never holds neighbouring rows of one document but by chance.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import rich.console
import rich.progress

from dsv2_jax.config import Config, check
from dsv2_jax.data import chat, preferences, retrieval
from dsv2_jax.data.corpora import Corpus, Source, published
from dsv2_jax.data.packing import Batch, CutRows, Documents, Mixed, PackedRows, WholeRows, document_ids, join
from dsv2_jax.data.tokenizer import Tokenizer


def train_batches(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, *, mine: Sequence[int] | np.ndarray | None = None
) -> "TrainBatches":
    """Micro-batches without end: all of their rows, or only the places `mine` (for the arrays see `blank_batch`).

    The order depends on `config.seed`, the corpus, the tokenizer, the rows and the length of a micro-batch alone, and
    changes with each epoch.
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
    """The rows of a split, `train` or `held_out`: text without gaps, conversations whole.

    Those to train on may be mixed with rows that ask for facts (`data.retrieval_share`). Raises ValueError if no
    conversation fits in a row.
    """
    if corpus.form == "preferences":
        return preferences.rows(getattr(corpus, split), tokenizer, length)
    documents = tokenised(corpus, split, tokenizer)
    if corpus.form == "text":
        text, data = CutRows(documents, length, tokenizer.bytes_per_token), config.data
        if split == "held_out" or not data.retrieval_share:
            return text
        asking = retrieval.RetrievalRows(
            documents.ids,
            tokenizer,
            length,
            count=math.ceil(len(text) * data.retrieval_share / (1 - data.retrieval_share)),
            weight=data.retrieval_weight,
        )
        return Mixed(text, asking)
    rows = WholeRows(documents, length, tokenizer.bytes_per_token, config.data.too_long)
    check(len(rows) > 0, f"no conversation of the {split} split fits in the {length} tokens of a row (batch.length)")
    return rows


class TrainBatches(grain.DatasetIterator[Batch]):
    """Counts batches. Its state is JSON: the number of the next one, and the facts that fix their order.

    epoch_tokens: rows x length of one pass over the data. left_out: conversations or preferences too long for a row.
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
    mine: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """The held-out split once, in a fixed order, `length` (else `config.batch.length`) positions a row.

    With a limit, only so many batches, of rows spread evenly over the split. The last batch is filled up with padding.
    Of each batch all rows, or only the places `mine`.
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
    """Every text as a document, in order, each batch [rows, length]; the last one is filled up with padding.

    Of each batch all rows, or only the places `mine`.
    """
    documents = join(document_ids(tokenizer, text) for text in texts)
    return CutRows(documents, length, tokenizer.bytes_per_token).batches(rows, mine=mine)


def tokenised(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Documents:
    """The documents of a split, `train` or `held_out`, tokenised once and mapped from files beside the corpus."""
    key = tokenizer.identity + (tokenizer.template.source if corpus.form == "conversations" else "")
    folder = corpus.folder / f"{split}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    if not folder.exists():
        with published(folder) as scratch:
            _tokenise(getattr(corpus, split), tokenizer, corpus.form, scratch)
    ids = np.memmap(folder / "ids.int32", np.int32, mode="r")
    learnt = None if corpus.form == "text" else np.memmap(folder / "learnt.bool", bool, mode="r")
    return Documents(ids, np.load(folder / "ends.npy"), learnt)


def _encode(tokenizer: Tokenizer, text: str, form: str) -> chat.Encoded:
    if form == "conversations":
        return chat.encode(json.loads(text), tokenizer)
    ids = document_ids(tokenizer, text)
    return chat.Encoded(ids, np.ones(len(ids), bool))


def _tokenise(source: Source, tokenizer: Tokenizer, form: str, folder: Path) -> None:
    console = rich.console.Console(stderr=True)
    numbers = rich.progress.track(
        range(len(source)), "tokenising", console=console, disable=not console.is_terminal, transient=True
    )
    ends, end = np.zeros(len(source), np.int64), 0
    with (folder / "ids.int32").open("wb") as file, (folder / "learnt.bool").open("wb") as learnt:
        for number in numbers:
            encoded = _encode(tokenizer, source[number]["text"].decode(), form)
            file.write(encoded.ids.tobytes())
            learnt.write(encoded.answers.tobytes() if form != "text" else b"")
            end += len(encoded.ids)
            ends[number] = end
    np.save(folder / "ends.npy", ends)
