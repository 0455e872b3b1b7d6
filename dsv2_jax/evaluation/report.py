"""Benchmark scores next to the paper's: a table for the terminal, and a page in Markdown or HTML."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from dsv2_jax.evaluation.suite import Benchmark, Row

_PAPER = {"67B": "dense_67b", "V2": "v2", "Lite": "lite", "V2 SFT": "sft", "V2 RL": "rl", "Lite Chat": "lite_chat"}
_BEST = ("acc_norm,none", "acc,none")  # metrics of a task that the paper does not have, the preferred one first
_NOTE = (
    "The paper's figures use its own data, prompts and harness; ours use the named task. "
    "Offline tasks are samples or other versions of the set, so their scores do not compare directly."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the report. value: of `metric`, as lm-eval gives it; None if `note` says why it is missing."""

    row: Row
    metric: str = ""
    value: float | None = None
    error: float | None = None  # standard error
    count: int = 0  # documents
    shots: int | None = None
    note: str = ""


def score(row: Row, figures: dict[str, Any], count: int, shots: int | None) -> Score:
    """The row's metric among a task's figures, or accuracy, or the first metric."""
    numbers = {k: v for k, v in figures.items() if isinstance(v, int | float) and "," in k and "_stderr" not in k}
    names = [k for k in (row.key, *_BEST, *numbers) if k in numbers]
    name, rule = names[0].split(",")
    error = figures.get(f"{name}_stderr,{rule}")
    return Score(
        row=row,
        metric=name,
        value=float(numbers[names[0]]),
        error=float(error) if isinstance(error, int | float) else None,
        count=count,
        shots=shots,
    )


def table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, with the paper's columns that have a figure in some row."""
    paper = [
        title
        for title, name in _PAPER.items()
        if any(s.row.benchmark and _paper(s.row.benchmark, name) for s in scores)
    ]
    titles = ["benchmark", "task", "shots", "documents", "metric", "ours", "± error", *paper, "remark"]
    cells = []
    for s in scores:
        b = s.row.benchmark
        shots = s.shots if s.shots is not None else s.row.shots
        cells.append(
            [
                b.name if b else s.row.task,
                s.row.task,
                "" if shots is None else str(shots),
                f"{s.count:,}" if s.count else "",
                s.metric or (b.metric if b else ""),
                _figure(s.value, s.metric),
                _figure(s.error, s.metric),
                *(_paper(b, _PAPER[title]) if b else "" for title in paper),
                s.note,
            ]
        )
    return titles, cells


def show(scores: Sequence[Score]) -> None:
    """Prints the table."""
    titles, cells = table(scores)
    printed = rich.table.Table(*titles, title="benchmarks")
    console = rich.console.Console()
    for row in cells:
        printed.add_row(*row)
    if not console.is_terminal:
        console.width = 220  # a log has no fixed width
    console.print(printed)


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores as JSON values, without empty ones."""
    plain = []
    for s in scores:
        one: dict[str, Any] = {"task": s.row.task, "metric": s.metric, "value": s.value, "stderr": s.error}
        one |= {"documents": s.count, "shots": s.shots, "note": s.note}
        if s.row.benchmark:
            one["paper"] = dataclasses.asdict(s.row.benchmark)
        plain.append({k: v for k, v in one.items() if v not in (None, "")})
    return plain


def write_page(path: Path, checkpoint: str, scores: Sequence[Score], figures: dict[str, Any]) -> None:
    """A page at `path`: HTML if it ends in .html, else Markdown. figures: of held-out text, shown above the table."""
    titles, cells = table(scores)
    held_out = {k: v for k, v in figures.items() if isinstance(v, int | float)}
    rows = [[name, f"{value:,.4g}"] for name, value in held_out.items()]
    parts = [(("figure", "value"), rows)] * bool(rows) + [(tuple(titles), cells)] * bool(cells)
    if path.suffix == ".html":
        tables = "\n".join(_html_table(head, body) for head, body in parts)
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(checkpoint)}</title>'
            "<style>body{font:15px system-ui;margin:2em}table{border-collapse:collapse;margin:1em 0}"
            "td,th{border:1px solid #bbb;padding:.3em .6em;text-align:left}</style>"
            f"<h1>{html.escape(checkpoint)}</h1>\n{tables}\n<p>{_NOTE}</p></html>\n"
        )
    else:
        tables = "\n\n".join(_markdown_table(head, body) for head, body in parts)
        text = f"# {checkpoint}\n\n{tables}\n\n{_NOTE}\n"
    path.write_text(text, encoding="utf-8")


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(t)}</th>" for t in head)]
    lines += ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _paper(benchmark: Benchmark, name: str) -> str:
    value = getattr(benchmark, name)
    return "" if value is None else f"{value:g}"


def _figure(value: float | None, metric: str) -> str:
    """Shares of answers in percent, as the paper gives them; anything else as it is."""
    if value is None:
        return ""
    share = metric.startswith(("acc", "exact_match", "pass", "f1", "prompt_level", "em"))
    return f"{100 * value:.1f}" if share else f"{value:.4g}"
