"""A report on GRPO: figures over seeds, answers before and after, a plot."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a screen

import matplotlib.pyplot as plt
import numpy as np

from dsv2_jax.training import metrics

SECONDS = "seconds.json"  # file in a run's folder with its duration
_SHOWN = 16  # questions in the table of answers


def write(workdir: Path, fine_tuned: Path, scored: Path, policies: list[Path]) -> str:
    """Writes report.md and grpo.png into `workdir`, from the folders of finished runs; returns the Markdown."""
    evaluations = [[line for line in metrics.read(run) if "held_out_solved" in line] for run in policies]
    names = [name for name in evaluations[0][0] if name.startswith("held_out_solved")]
    table = [
        "| held-out questions solved, greedily | SFT | GRPO, mean | seeds | gain, points |",
        "|---|---:|---:|---|---:|",
    ]
    rows = {name.removeprefix("held_out_solved").lstrip("_") or "all": [name] for name in names}
    if names[1:]:
        rows["mean of the tasks"] = names[1:]
    for task, of in rows.items():
        before, after = (
            np.array([100 * np.mean([lines[at][name] for name in of]) for lines in evaluations]) for at in (0, -1)
        )
        each = ", ".join(f"{x:.1f}" for x in after)
        gain = after - before
        table.append(
            f"| {task} | {before.mean():.1f} | {after.mean():.1f} | {each} | "
            f"{gain.mean():+.1f} ({gain.min():+.1f} to {gain.max():+.1f}) |"
        )
    pairs = [line for line in metrics.read(scored) if line.get("held_out_whole")][-1]
    times = {run.name: json.loads((run / SECONDS).read_text()) for run in (fine_tuned, scored, *policies)}
    shared = " The seeds share base model and fine-tuning." if len(policies) > 1 else ""
    _picture(policies, workdir / "grpo.png")
    text = "\n".join(
        [
            "# From a base model to a better reasoner",
            "",
            f"GRPO with {len(policies)} seeds, {evaluations[0][-1]['step']} steps each.{shared}",
            "",
            *table,
            "",
            f"Reward model: {100 * pairs['held_out_accuracy']:.1f}% of {pairs['held_out_preferences']} held-out pairs.",
            "",
            "Minutes: " + ", ".join(f"{name} {x / 60:.1f}" for name, x in times.items()),
            "",
            "![reward, solved questions, KL and response length](grpo.png)",
            "",
            f"## Answers before and after, {policies[0].name}",
            "",
            *_answers(policies[0]),
            "",
        ]
    )
    (workdir / "report.md").write_text(text, encoding="utf-8")
    return text


def _answers(run: Path) -> list[str]:
    """A Markdown table of held-out questions with the answers of the first and the last evaluation."""
    lines = [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    first, last = ([line for line in lines if line["step"] == step] for step in (min(steps), max(steps)))
    shown = min(_SHOWN, len(first))
    chosen = [i * len(first) // shown for i in range(shown)]
    table = ["| question | SFT | GRPO |", "|---|---|---|"]
    return table + [f"| {_cell(first[i]['prompt'])} | {_verdict(first[i])} | {_verdict(last[i])} |" for i in chosen]


def _verdict(line: dict[str, Any]) -> str:
    """An answer with a mark for right or wrong."""
    right = next(iter(line["rewards"].values())) >= 1
    return f"{_cell(line['response'])} {'✓' if right else '✗'}"


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def _picture(policies: list[Path], path: Path) -> None:
    """Plots reward, share of solved questions, KL and response length over steps, one line per seed."""
    panels = {
        "reward": "reward, sampled", "held_out_solved": "held-out, solved", "kl": "KL to SFT",
        "response_tokens": "tokens per response",
    }  # fmt: skip
    figure, every = plt.subplots(len(panels), 1, figsize=(8, 9), sharex=True, layout="constrained")
    for axes, (name, label) in zip(every, panels.items(), strict=True):
        for run in policies:
            lines = [line for line in metrics.read(run) if name in line]
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=run.name)
        axes.set(ylabel=label)
        axes.grid(alpha=0.25)
    every[0].legend(frameon=False)
    every[-1].set(xlabel="step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
