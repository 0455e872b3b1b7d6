"""Runs benchmark tasks one after another and collects a score or a reason for each."""

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import rich.console
from lm_eval.tasks import TaskManager

from dsv2_jax.cli import nearest
from dsv2_jax.config import check
from dsv2_jax.evaluation import report
from dsv2_jax.evaluation.harness import Harness, UnfitError
from dsv2_jax.evaluation.suite import Row
from dsv2_jax.parallel import processes

TASKS = Path(__file__).parent / "tasks"


@functools.cache
def manager() -> TaskManager:
    """lm-eval's tasks and ours; listing them takes seconds."""
    return TaskManager(include_path=str(TASKS))


def check_names(rows: Sequence[Row]) -> None:
    """Raises ValueError for an unknown task."""
    known = manager()
    for row in rows:
        exists = bool(row.missing) or row.task in known.task_index
        check(exists, f"no task {row.task!r}{nearest(row.task, known.all_tasks)}")


def run(
    harness: Harness,
    rows: Sequence[Row],
    *,
    limit: int | None,
    chat: bool,
    max_new: int,
    offline: bool,
    samples: Path | None,
) -> list[report.Score]:
    """Scores of the rows; a group of lm-eval's without a score of its own gives one per task.

    limit: documents per task, None for all. chat: format the texts as conversations. max_new: tokens of an answer, 0
    for the task's number. samples: a folder for JSON lines of every document with its answer. A task that cannot run
    gives a score with a note.
    """
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known, console = manager(), rich.console.Console(stderr=True, quiet=not processes.is_first())
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides the signature
    scores = []
    for row in rows:
        if row.missing:
            scores.append(report.Score(row=row, note=f"not available: {row.missing}"))
            continue
        console.print(f"{row.task} ...", highlight=False)
        try:
            found = evaluate(
                harness,
                tasks=[row.task],
                num_fewshot=row.shots,
                limit=limit,
                apply_chat_template=chat,
                gen_kwargs={"max_gen_toks": max_new} if max_new else None,
                task_manager=known,
                log_samples=samples is not None,
                bootstrap_iters=0 if limit else 1000,
            )
        except (
            UnfitError,
            ImportError,
            OSError,
        ) as error:  # the task does not fit the model, or its data or a library is missing
            why = " ".join(str(error).split())[:160]
            scores.append(report.Score(row=row, note=f"not run: {type(error).__name__}: {why}"))
            continue
        scores += _scores(row, found)
        if samples is not None and processes.is_first():
            _keep(samples, found)
    return scores


def _scores(row: Row, found: dict[str, Any]) -> list[report.Score]:
    """The score of the row's task; the scores of its tasks if it is a group without figures of its own."""
    names = [row.task] if _numbers(found["results"].get(row.task, {})) else sorted(found["results"])
    scores = []
    for name in filter(lambda n: _numbers(found["results"][n]), names):
        counts = [n["effective"] for task, n in found["n-samples"].items() if task == name or name == row.task]
        one = row if name == row.task else Row(task=name)
        scores.append(report.score(one, found["results"][name], sum(counts), found["n-shot"].get(name)))
    return scores


def _numbers(figures: dict[str, Any]) -> bool:
    return any(isinstance(v, int | float) and "," in k for k, v in figures.items())


def _keep(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for task, documents in found["samples"].items():
        with (folder / f"{task}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(d, ensure_ascii=False, default=str) + "\n" for d in documents)
