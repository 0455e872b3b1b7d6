"""The command that evaluates: eval.py or dsv2-eval --checkpoint RUN_OR_HF_FOLDER [--text FILE] [--tasks A,B]."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv2_jax import cli
from dsv2_jax.config import Mesh, Processes, check
from dsv2_jax.evaluation.needle import Needle
from dsv2_jax.inference.engine import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Bits per byte and perplexity on held-out text, benchmarks, needles in a haystack, or logits of given ids."""

    checkpoint: Path  # a run's folder or a Hugging Face folder
    text: Path | None = None  # a text or JSONL file, or a folder of these; else the held-out split of the run's data
    length: int = 0  # tokens per row; 0: as in training
    json: Path | None = None  # output file for all figures
    page: Path | None = None  # output file for a page of the figures: HTML if it ends in .html, else Markdown
    tasks: str = ""  # a,b: of lm-eval, ours, or groups (deepseek_v2_base, deepseek_v2_chat, deepseek_v2_offline)
    num_fewshot: int | None = None  # examples before each question, in place of the task's
    limit: int | None = None  # documents per task
    chat: bool = False  # format the tasks' texts as conversations
    max_gen_toks: int = 0  # maximum number of tokens of an answer; 0: the task's
    offline: bool = False  # run only those tasks of the paper's groups that need no network after one download
    samples: Path | None = None  # output folder for every document of the tasks with its answer
    skip_text: bool = False  # skip the figures of held-out text
    needle: bool = False  # find needles in haystacks, with the settings below
    haystack: Needle = dataclasses.field(default_factory=Needle)
    capacity: Capacity = dataclasses.field(default_factory=Capacity)  # of the engine, for tasks and needles
    token_ids: Path | None = None  # a .npy of ids [B, T]; with --logits, nothing else is done
    logits: Path | None = None  # output .npy for their float32 logits [B, T, vocabulary]
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    processes: Processes = dataclasses.field(default_factory=Processes)


def main() -> None:
    """Reads the command line and evaluates."""
    args = cli.parse(Evaluate, prog=cli.called("eval.py"))
    check((args.token_ids is None) == (args.logits is None), "--token-ids and --logits need each other")
    check(not args.skip_text or bool(args.tasks) or args.needle, "--skip-text leaves nothing: add --tasks or --needle")
    from dsv2_jax.parallel import processes, xla  # imported here so that mistakes and --help are answered at once

    xla.choose()
    cli.keep_compiled_programs()
    ids_BT = None if args.token_ids is None else cli.read_ids(args.token_ids)
    with processes.joined(args.processes):
        run(args, ids_BT)


def run(args: Evaluate, ids_BT: np.ndarray | None) -> None:
    """Evaluates once all processes have joined: every process computes, the first one prints and writes."""
    from dsv2_jax import loading
    from dsv2_jax.evaluation import logits, needle, report, text
    from dsv2_jax.parallel import mesh, processes

    if ids_BT is not None:
        assert args.logits is not None
        logits.write(loading.load(args.checkpoint), ids_BT, args.logits)
        return
    devices = mesh.make(args.mesh)
    figures: dict[str, Any] = {}
    if not args.skip_text:
        figures = text.evaluate(
            loading.load(args.checkpoint, devices, masters=False),
            str(args.checkpoint),
            devices,
            text=args.text,
            length=args.length,
        )
        if processes.is_first():
            text.show(figures)
    scores: list[report.Score] = []
    if args.tasks or args.needle:  # loads again: the engine's weights have another form than those for text
        loaded = loading.load_for_engine(args.checkpoint, devices, weights=args.capacity.weights)
        scores = benchmark(loaded, args, devices) if args.tasks else []
        if args.needle:
            figures["needle"] = needle.evaluate(loaded, args.haystack, args.capacity, devices)
    if not processes.is_first():
        return
    if args.page is not None:
        report.write_page(args.page, str(args.checkpoint), scores, figures)
    if args.json is not None:
        if scores:
            figures["benchmarks"] = report.as_json(scores)
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def benchmark(loaded: Any, args: Evaluate, devices: Any) -> list[Any]:
    """Runs the tasks and prints their scores."""
    from dsv2_jax.evaluation import benchmarks, report, suite  # lm-eval takes seconds to import
    from dsv2_jax.evaluation.harness import Harness
    from dsv2_jax.parallel import processes

    rows = suite.rows(args.tasks, offline=args.offline, shots=args.num_fewshot)
    benchmarks.check_names(rows)
    scores = benchmarks.run(
        Harness(loaded, capacity=args.capacity, devices=devices),
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


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
