"""Kills a training run with SIGKILL at random moments, resumes it, and compares it to the bit with a run left alone.

    python benchmarks/kill_and_resume.py [--preset nano] [--kills 10] [--seed 0] [--json FILE] -- [TRAIN FLAGS ...]

Flags behind `--` go to train.py. Exit code 0 if every figure that does not depend on the clock agrees, else 1.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rich.console
import rich.table

from dsv2_jax import cli
from dsv2_jax.training import metrics

_TRAIN = Path(__file__).resolve().parent.parent / "train.py"
_CLOCK = "tokens_per_second", "mfu"  # what a clock gave differs between any two runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Kill and resume a training run, and compare it with one left alone."""

    preset: str = "nano"  # what is trained
    kills: int = 10  # random moments
    seed: int = 0  # of the moments
    folder: Path | None = None  # where both runs go; a new temporary folder if not given
    json: Path | None = None  # the figures, for a program


def lines(run: Path) -> list[dict]:
    """The run's metrics without what the clock gave."""
    return [{k: v for k, v in line.items() if k not in _CLOCK} for line in metrics.read(run)]


def train(preset: str, run: Path, flags: list[str], seconds: float | None = None) -> int:
    """Runs train.py, killed after `seconds`; returns its exit code, -9 if killed."""
    command = [sys.executable, str(_TRAIN), preset, "--workdir", str(run), *flags]
    with (
        (run.parent / f"{run.name}.log").open("a") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            return process.wait()


def main() -> int:
    """Trains twice, once in peace and once killed, and prints both ends."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    options, flags = cli.parse(Options(), argv[:at], prog="kill_and_resume.py"), argv[at + 1 :]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    peaceful, killed = folder / "left_alone", folder / "killed"

    start = time.monotonic()
    if code := train(options.preset, peaceful, flags):
        print(f"the run left alone ended with exit code {code}; see {peaceful}.log", file=sys.stderr)
        return 1
    duration = time.monotonic() - start
    moments = random.Random(options.seed)
    died_at = []
    while len(died_at) < options.kills:
        # On average the kills spread over the run; lives short enough to end in start-up or restore are meant.
        code = train(options.preset, killed, flags, moments.uniform(0, 2 * duration / (options.kills + 1)))
        if code != -signal.SIGKILL:
            break
        died_at.append(max((line["step"] for line in lines(killed)), default=0))
    code = train(options.preset, killed, flags)
    if code:
        print(f"the killed run ended with exit code {code}; see {killed}.log", file=sys.stderr)
        return 1

    a, b = lines(peaceful), lines(killed)
    figures = {
        "kills": len(died_at),
        "last_logged_step_at_each_kill": died_at,
        "steps": a[-1]["step"],
        "lines_compared": len(a),
        "identical": a == b,
    }
    table = rich.table.Table("at the end", "left alone", f"killed {len(died_at)} times")
    for name in ("nll", "held_out_nll", "held_out_bits_per_byte"):
        ends = [[line[name] for line in run if name in line][-1] for run in (a, b)]
        figures[name] = ends
        table.add_row(name, *map(repr, ends))
    console = rich.console.Console()
    console.print(table)
    console.print(f"last step logged at each kill: {died_at} of {figures['steps']}")
    console.print(f"{len(a)} lines of metrics: {'identical to the bit' if a == b else 'DIFFERENT'}; runs in {folder}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if a == b else 1


if __name__ == "__main__":
    cli.main(main)
