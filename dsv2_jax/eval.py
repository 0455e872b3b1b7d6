"""The command that evaluates: eval.py or dsv2-eval --checkpoint RUN_OR_HF_FOLDER [--text FILE] [--tasks A,B]."""

import dataclasses
import functools
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import rich.table

from dsv2_jax import cli
from dsv2_jax.config import Data, Mesh, Processes, check
from dsv2_jax.evaluation.needle import Needle
from dsv2_jax.inference.engine import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Bits per byte and perplexity on held-out text, benchmarks, needles in a haystack, or logits for given ids."""

    checkpoint: Path  # a run's folder or a Hugging Face folder
    text: Path | None = None  # a text or JSONL file or a folder of such; else the held-out split of the run's own data
    length: int = 0  # tokens of a row; 0: as in training
    json: Path | None = None  # where the figures go
    page: Path | None = None  # where a page of the figures goes: HTML if it ends in .html, else Markdown
    tasks: str = ""  # of lm-eval, ours, or groups (deepseek_v2_base, deepseek_v2_chat, deepseek_v2_offline); a,b
    num_fewshot: int | None = None  # examples before each question, in place of the task's
    limit: int | None = None  # documents of each task
    chat: bool = False  # write the tasks' texts as conversations
    max_gen_toks: int = 0  # tokens of an answer, in place of the task's
    offline: bool = False  # of the paper's groups, only what needs no network once fetched
    samples: Path | None = None  # a folder for all documents of the tasks with what was answered
    skip_text: bool = False  # leave out the figures of held-out text
    needle: bool = False  # look for needles in haystacks, of the settings below
    haystack: Needle = dataclasses.field(default_factory=Needle)
    capacity: Capacity = dataclasses.field(default_factory=Capacity)  # of the engine, for tasks and needles
    token_ids: Path | None = None  # a .npy of ids [B, T]; with --logits, nothing else is done
    logits: Path | None = None  # where their float32 logits [B, T, vocabulary] go, .npy
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    processes: Processes = dataclasses.field(default_factory=Processes)


def main() -> None:
    """The command line."""
    args = cli.parse(Evaluate, prog=cli.called("eval.py"))
    check((args.token_ids is None) == (args.logits is None), "--token-ids and --logits belong together")
    check(not args.skip_text or bool(args.tasks) or args.needle, "--skip-text leaves nothing: add --tasks or --needle")
    from dsv2_jax.parallel import processes, xla

    xla.choose()
    cli.keep_compiled_programs()
    ids_BT = None if args.token_ids is None else cli.read_ids(args.token_ids)
    with processes.joined(args.processes):
        run(args, ids_BT)


def run(args: Evaluate, ids_BT: np.ndarray | None) -> None:
    """What the command does once its processes have met.

    With several, the engine's mesh is of the devices of all. Each of them asks it the same, and the first one tells.
    """
    from dsv2_jax import loading
    from dsv2_jax.parallel import mesh, processes

    if ids_BT is not None:
        assert args.logits is not None
        write_logits(loading.load(args.checkpoint), ids_BT, args.logits)
        return
    devices = mesh.make(args.mesh)
    figures: dict[str, Any] = {}
    if not args.skip_text:
        figures = evaluate(loading.load(args.checkpoint, devices, masters=False), args, devices)
        if processes.is_first():
            show(figures)
    scores: list[Any] = []
    if args.tasks or args.needle:  # read anew, for what held-out text and the engine compute with are two forms
        loaded = loading.load_for_engine(args.checkpoint, devices, weights=args.capacity.weights)
        scores = benchmark(loaded, args, devices) if args.tasks else []
        if args.needle:
            from dsv2_jax.evaluation import needle

            figures["needle"] = needle.evaluate(loaded, args.haystack, args.capacity, devices)
    if not processes.is_first():
        return
    if args.page is not None:
        from dsv2_jax.evaluation import report

        report.write_page(args.page, str(args.checkpoint), scores, figures)
    if args.json is not None:
        if scores:
            from dsv2_jax.evaluation import report

            figures["benchmarks"] = report.as_json(scores)
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def benchmark(loaded: Any, args: Evaluate, mesh: Any) -> list[Any]:
    """Scores of the tasks, printed."""
    from dsv2_jax.evaluation import benchmarks, report, suite
    from dsv2_jax.evaluation.harness import Harness
    from dsv2_jax.parallel import processes

    rows = suite.rows(args.tasks, offline=args.offline, shots=args.num_fewshot)
    benchmarks.check_names(rows)
    harness = Harness(loaded, capacity=args.capacity, devices=mesh)
    scores = benchmarks.run(
        harness,
        rows,
        limit=args.limit,
        chat=args.chat,
        max_new=args.max_gen_toks,
        offline=args.offline,
        samples=args.samples,
    )
    if processes.is_first():
        report.show(scores)
    return scores


def evaluate(loaded: Any, args: Evaluate, mesh: Any) -> dict[str, Any]:
    """Figures of the held-out split, or of all of --text; with `xz_bits_per_byte` of the same text for comparison."""
    from dsv2_jax.data import corpora, pipeline
    from dsv2_jax.evaluation import perplexity
    from dsv2_jax.parallel import processes, sharding
    from dsv2_jax.parallel.feed import Feed
    from dsv2_jax.parallel.mesh import BATCH

    words, config = loaded.need_tokenizer(), loaded.config
    check(loaded.model.head == "tokens", f"{args.checkpoint} is a reward model: it scores answers and predicts no text")
    length = args.length or config.batch.length
    check(
        0 < length <= loaded.model.max_position_embeddings,
        f"--length {length} exceeds the model's {loaded.model.max_position_embeddings} positions",
    )
    if args.text is None:
        with processes.first_before_others("data"):
            corpus = corpora.prepare(config.data)
        texts = [example["text"].decode() for example in map(corpus.held_out.__getitem__, range(len(corpus.held_out)))]
    else:
        texts = [document.text for document in corpora.local(args.text, Data.text_field)()]
        check(any(map(str.strip, texts)), f"{args.text} holds no text")
    rows = math.lcm(8, config.mesh.size(*BATCH))
    sharding.check_batch(rows, length, loaded.model, config.mesh, dropping=False)
    feed = Feed(mesh, config.mesh, rows)
    batches = pipeline.batches_of_text(texts, words, rows=rows, length=length, mine=feed.mine)
    figures = perplexity.evaluate(loaded.params, _progress(batches), config=config, feed=feed, mesh=mesh)
    check(
        math.isfinite(figures["nll"]), f"the loss of {args.checkpoint} on this text is {figures['nll']}, not a number"
    )
    load_LE = figures.pop("load_LE", None)
    whole = "".join(texts).encode()
    figures["xz_bits_per_byte"] = 8 * len(lzma.compress(whole, preset=9)) / len(whole)
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
        "load_max_by_layer": "busiest expert by layer (1 is average)",
        "load_min_by_layer": "idlest expert by layer",
        "experts_without_tokens": "experts without tokens",
    }
    for key, form in rows.items():
        if key in figures:
            table.add_row(names.get(key, key), form(figures[key]))
    rich.console.Console().print(table)


def write_logits(loaded: Any, ids_BT: np.ndarray, path: Path) -> None:
    """Saves float32 logits [B, T, vocabulary] of ids [B, T], computed in float32 and written row by row."""
    import jax
    import jax.numpy as jnp

    from dsv2_jax.config import Compute
    from dsv2_jax.model import transformer

    model = loaded.model
    b, t = ids_BT.shape
    check(
        ids_BT.min() >= 0 and ids_BT.max() < model.vocab_size,
        f"token ids must lie in 0 to {model.vocab_size - 1}; found {ids_BT.min()} to {ids_BT.max()}",
    )
    check(
        t <= model.max_position_embeddings, f"{t} tokens exceed the model's {model.max_position_embeddings} positions"
    )

    @jax.jit
    def row_logits(params: Any, ids_1T: jax.Array) -> jax.Array:
        batch = {"tokens_BT": ids_1T, "positions_BT": jnp.arange(t)[None], "segments_BT": jnp.ones((1, t), jnp.int32)}
        out = transformer.forward(params, batch, model=model, compute=Compute(dtype="float32", remat="none"))
        return transformer.logits(params, out.hidden_BTD)[0]

    out_BTW = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(b, t, model.vocab_size))
    for row in range(b):
        out_BTW[row] = row_logits(loaded.params, jnp.asarray(ids_BT[row : row + 1], jnp.int32))
    out_BTW.flush()
    print(f"wrote logits [{b}, {t}, {model.vocab_size}] to {path}")


def _progress(batches: Iterator[Any]) -> Iterator[Any]:
    """A bar on a terminal; nothing in a log."""
    console = rich.console.Console(stderr=True)
    listed = list(batches)
    yield from rich.progress.track(listed, "evaluating", console=console, disable=not console.is_terminal)


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
