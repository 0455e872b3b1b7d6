"""Perplexity and bits per byte of a checkpoint on held-out or given text, with the load of its experts."""

import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table

from dsv2_jax.config import Config, Data, check
from dsv2_jax.data import corpora, pipeline
from dsv2_jax.evaluation import perplexity
from dsv2_jax.loading import Loaded
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.parallel.mesh import BATCH


def evaluate(
    loaded: Loaded, name: str, mesh: jax.sharding.Mesh | None, *, text: Path | None = None, length: int = 0
) -> dict[str, Any]:
    """Figures of the file or folder `text`. Without `text`, of the held-out split of the checkpoint's own data.

    name: of the checkpoint, for messages. length: tokens per row; 0 for that of training. Returns the figures of
    `perplexity.evaluate`, `xz_bits_per_byte` of the same text for comparison, and with experts their loads by layer.
    Raises ValueError for a checkpoint without tokenizer, a reward model, a bad length, and text that is missing or
    empty.
    """
    tokenizer, config = loaded.need_tokenizer(), loaded.config
    check(loaded.model.head == "tokens", f"{name} is a reward model: it scores answers and does not predict text")
    length = length or config.batch.length
    check(
        0 < length <= loaded.model.max_position_embeddings,
        f"--length {length} exceeds the model's {loaded.model.max_position_embeddings} positions",
    )
    texts = _texts(config, text)
    rows = math.lcm(8, config.mesh.size(*BATCH))
    sharding.check_batch(rows, length, loaded.model, config.mesh, dropping=False)
    place = BatchPlacement(mesh, config.mesh, rows)
    batches = pipeline.batches_of_text(texts, tokenizer, rows=rows, length=length, mine=place.mine)
    figures = perplexity.evaluate(loaded.params, _progress(batches), config=config, place=place, mesh=mesh)
    check(math.isfinite(figures["nll"]), f"the loss of {name} on this text is {figures['nll']}, not a finite number")
    load_LE = figures.pop("load_LE", None)
    content = "".join(texts).encode()
    figures["xz_bits_per_byte"] = 8 * len(lzma.compress(content, preset=9)) / len(content)
    if load_LE is not None:
        figures["load_max_by_layer"] = load_LE.max(axis=1).round(3).tolist()
        figures["load_min_by_layer"] = load_LE.min(axis=1).round(3).tolist()
        figures["experts_without_tokens"] = int((load_LE == 0).sum())
    return figures


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    table = rich.table.Table("figure", rich.table.Column("value", justify="right"))
    rows: dict[str, Callable[[Any], str]] = {
        "bits_per_byte": "{:.4f}".format,
        "xz_bits_per_byte": "{:.4f}".format,
        "perplexity": "{:.3f}".format,
        "nll": "{:.4f}".format,
        "tokens": "{:,}".format,
        "bytes": "{:,}".format,
        "load_max_by_layer": str,
        "load_min_by_layer": str,
        "experts_without_tokens": str,
    }
    names = {
        "bits_per_byte": "bits per byte",
        "xz_bits_per_byte": "bits per byte of xz -9 on the same text",
        "nll": "nats per token",
        "load_max_by_layer": "highest expert load by layer (1 is average)",
        "load_min_by_layer": "lowest expert load by layer",
        "experts_without_tokens": "experts without tokens",
    }
    for key, form in rows.items():
        if key in figures:
            table.add_row(names.get(key, key), form(figures[key]))
    rich.console.Console().print(table)


def _texts(config: Config, text: Path | None) -> list[str]:
    if text is None:
        with processes.first_before_others("data"):
            held_out = corpora.prepare(config.data).held_out
        return [held_out[i]["text"].decode() for i in range(len(held_out))]
    texts = [document.text for document in corpora.local(text, Data.text_field)()]
    check(any(map(str.strip, texts)), f"{text} holds no text")
    return texts


def _progress(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, with a progress bar if stderr is a terminal."""
    console = rich.console.Console(stderr=True)
    listed = list(batches)
    yield from rich.progress.track(listed, "evaluating", console=console, disable=not console.is_terminal)
