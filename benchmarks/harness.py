"""Our lm-eval model beside lm-eval's own `hf` backend on one Hugging Face folder: answers compared, and their time.

python benchmarks/harness.py --checkpoint HF_DIR [--tasks A,B] [--limit N] [--json FILE]
Each side answers all tasks in one evaluation, twice and in turn; the second counts, when programs are compiled.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is where Python looks

from dsv2_jax import cli, loading
from dsv2_jax.inference.engine import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """What both are asked."""

    checkpoint: Path  # a Hugging Face folder
    tasks: str = "offline_mmlu,offline_piqa,offline_boolq,offline_gsm8k_100"
    limit: int = 40  # documents of each
    max_gen_toks: int = 64
    batch_size: int = 16  # of the hf backend
    json: Path | None = None


def main() -> None:
    """Runs both, prints the table."""
    args = cli.parse(Compare, prog="benchmarks/harness.py")
    cli.keep_compiled_programs()
    from lm_eval.models.huggingface import HFLM

    from dsv2_jax.evaluation import benchmarks
    from dsv2_jax.evaluation.harness import Harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = Harness(loading.load(args.checkpoint), capacity=Capacity())
    backend: Any = HFLM  # its decorator hides what it takes
    theirs = backend(pretrained=str(args.checkpoint), dtype="float32", device="cpu", batch_size=args.batch_size)
    known, tasks = benchmarks.manager(), args.tasks.split(",")
    sides = {"ours": ours, "hf": theirs}
    for model in sides.values():
        ask(model, tasks, known, args)
    answers, seconds = {}, {}
    for name, model in sides.items():
        answers[name], seconds[name] = ask(model, tasks, known, args)
    rows = [{"task": task, **compare(answers["ours"], answers["hf"], task)} for task in tasks]
    table = rich.table.Table(*rows[0])
    for row in rows:
        table.add_row(*[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    share = seconds["ours"] / seconds["hf"]
    console.print(f"{seconds['ours']:.1f} s, hf {seconds['hf']:.1f} s: {share:.3f} of its time")
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "seconds": seconds, "share_of_hf": share}, indent=2) + "\n")


def ask(model: Any, tasks: list[str], known: Any, args: Compare) -> tuple[dict[str, Any], float]:
    """lm-eval's results and the seconds that they took, building of the texts included."""
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate
    start = time.perf_counter()
    found = evaluate(
        model,
        tasks=tasks,
        limit=args.limit,
        gen_kwargs={"max_gen_toks": args.max_gen_toks},
        task_manager=known,
        bootstrap_iters=0,
    )
    return found, time.perf_counter() - start


def compare(found: dict[str, Any], wanted: dict[str, Any], task: str) -> dict[str, Any]:
    """The largest difference of a document's log-likelihoods, answers that differ, and whether scores are the same."""
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
