"""Compares our lm-eval model with lm-eval's own `hf` backend on one Hugging Face folder: answers and time.

    python benchmarks/harness.py --checkpoint HF_DIR [--tasks A,B] [--limit N] [--json FILE]

Each side runs all tasks in one evaluation, twice, and the sides alternate. The second evaluation counts, because its
programs are compiled already.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python searches the script's own folder only

from dsv2_jax import cli, loading
from dsv2_jax.inference.engine import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessBenchmark:
    """Compare our lm-eval model with lm-eval's hf backend."""

    checkpoint: Path  # a Hugging Face folder
    tasks: str = "offline_mmlu,offline_piqa,offline_boolq,offline_gsm8k_100"
    limit: int = 40  # documents of each task
    max_gen_toks: int = 64
    batch_size: int = 16  # of the hf backend
    json: Path | None = None


def main() -> None:
    """Runs both sides and prints the table."""
    args = cli.parse(HarnessBenchmark, prog="benchmarks/harness.py")
    cli.keep_compiled_programs()
    from lm_eval.models.huggingface import HFLM

    from dsv2_jax.evaluation import benchmarks
    from dsv2_jax.evaluation.harness import Harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = Harness(loading.load(args.checkpoint), capacity=Capacity())
    backend: Any = HFLM  # its decorator hides its signature
    theirs = backend(pretrained=str(args.checkpoint), dtype="float32", device="cpu", batch_size=args.batch_size)
    known, tasks = benchmarks.manager(), args.tasks.split(",")
    sides = {"ours": ours, "hf": theirs}
    for model in sides.values():
        evaluate(model, tasks, known, args)
    answers, seconds = {}, {}
    for name, model in sides.items():
        answers[name], seconds[name] = evaluate(model, tasks, known, args)
    rows = [{"task": task, **compare(answers["ours"], answers["hf"], task)} for task in tasks]
    table = rich.table.Table(*rows[0])
    for row in rows:
        table.add_row(*[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    share = seconds["ours"] / seconds["hf"]
    console.print(f"ours {seconds['ours']:.1f} s, hf {seconds['hf']:.1f} s: {share:.3f} of the time of hf")
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "seconds": seconds, "share_of_hf": share}, indent=2) + "\n")


def evaluate(model: Any, tasks: list[str], known: Any, args: HarnessBenchmark) -> tuple[dict[str, Any], float]:
    """lm-eval's results and the seconds they took, including the construction of the requests."""
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate
    start = time.perf_counter()
    found = simple_evaluate(
        model,
        tasks=tasks,
        limit=args.limit,
        gen_kwargs={"max_gen_toks": args.max_gen_toks},
        task_manager=known,
        bootstrap_iters=0,
    )
    return found, time.perf_counter() - start


def compare(found: dict[str, Any], wanted: dict[str, Any], task: str) -> dict[str, Any]:
    """Maximal difference of a document's log-likelihoods, number of different answers, and whether scores are equal."""
    worst, other, count = 0.0, 0, 0
    for a, b in zip(found["samples"][task], wanted["samples"][task], strict=True):
        for x, y in zip(a["resps"], b["resps"], strict=True):
            count += 1
            if isinstance(y[0], str):
                other += x != y
            else:
                worst = max(worst, float(np.abs(np.float64(x[0][0]) - np.float64(y[0][0]))))
    figures = [{k: v for k, v in r["results"][task].items() if isinstance(v, float)} for r in (found, wanted)]
    return {"answers": count, "worst_difference": worst, "other_texts": other, "same_scores": figures[0] == figures[1]}


if __name__ == "__main__":
    cli.main(main)
