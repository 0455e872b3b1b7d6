"""The whole path of alignment at a size for a laptop: base, fine-tuning, reward model, GRPO with some seeds, a report.

    python -m dsv2_jax.alignment [--base runs/demo] [--workdir runs/align] [--seeds 0 1 2]

Every stage is a run of train.py of its own, so the same command goes on where it was stopped.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

from dsv2_jax import cli
from dsv2_jax.alignment import report
from dsv2_jax.training import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align:
    """Fine-tunes a base model of the preset nano, trains a reward model and the policy, and writes a report."""

    base: Path = Path("runs/demo")  # trained here if it is not there
    workdir: Path = Path("runs/align")
    seeds: tuple[int, ...] = (0, 1, 2)  # of GRPO; base, fine-tuning and reward model are shared


def main() -> int:
    """Runs the stages that are not done yet, and reports."""
    align = cli.parse(Align, prog=cli.called("python -m dsv2_jax.alignment"))
    if not any(line.get("held_out_whole") for line in metrics.read(align.base)):  # not there, or not finished
        stage("nano", align.base)
    fine_tuned, scored = align.workdir / "sft", align.workdir / "reward"
    stage("nano_sft", fine_tuned, "--init", str(align.base))
    stage("nano_reward", scored, "--init", str(fine_tuned))
    policies = [align.workdir / f"grpo-{seed}" for seed in align.seeds]
    for seed, policy in zip(align.seeds, policies, strict=True):
        stage("nano_grpo", policy, "--init", str(fine_tuned), "--seed", str(seed))
    text = report.write(align.workdir, fine_tuned, scored, policies)
    print("\n" + text.split("\n## Answers")[0])
    print(f"report      {align.workdir / 'report.md'}")
    return 0


def stage(preset: str, run: Path, *flags: str) -> None:
    """One run of train.py, unless it is finished; how long it took is kept beside it. Ends with its exit code."""
    seconds = run / report.SECONDS
    if seconds.exists():
        return
    print(f"\n== {preset} -> {run}", flush=True)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "dsv2_jax.train", preset, "--workdir", run, *flags], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    seconds.write_text(json.dumps(time.monotonic() - begin))


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
