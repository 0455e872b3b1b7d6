"""All stages of alignment at laptop size: base model, fine-tuning, reward model, GRPO with several seeds, a report.

    python -m dsv2_jax.alignment [--base runs/demo] [--workdir runs/align] [--seeds 0 1 2]

Each stage is a run of train.py. After an interruption the same command continues.
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
    """Fine-tunes a base model of the preset nano, trains a reward model and policies, and writes a report."""

    base: Path = Path("runs/demo")  # trained first if it is missing
    workdir: Path = Path("runs/align")
    seeds: tuple[int, ...] = (0, 1, 2)  # one policy each; base, fine-tuning and reward model are shared


def main() -> int:
    """Runs the stages that are not finished, and writes the report."""
    align = cli.parse(Align, prog=cli.called("python -m dsv2_jax.alignment"))
    if not any(line.get("held_out_whole") for line in metrics.read(align.base)):  # missing or unfinished
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
    """Runs train.py unless the run is finished, and stores its duration. Ends with its exit code if it fails."""
    seconds = run / report.SECONDS
    if seconds.exists():
        return
    print(f"\n== {preset} -> {run}", flush=True)
    begin = time.monotonic()
    finished = subprocess.run([sys.executable, "-m", "dsv2_jax.train", preset, "--workdir", run, *flags], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    seconds.write_text(json.dumps(time.monotonic() - begin))


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
