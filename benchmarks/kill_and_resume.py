"""Kills a training run with SIGKILL at random times, resumes it, and compares it bit for bit with an undisturbed run.

    python benchmarks/kill_and_resume.py [--preset nano] [--kills 10] [--seed 0] [--json FILE] -- [TRAIN FLAGS ...]

Flags after `--` go to train.py. Exit code 0 if all figures except times agree, else 1.
"""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from dsv2_jax import cli  # noqa: E402
from dsv2_jax.training import metrics  # noqa: E402

_CLOCK = "tokens_per_second", "mfu"  # measured with a clock, so they differ between any two runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillBenchmark:
    """Kill and resume a training run, and compare it with an undisturbed run."""

    preset: str = "nano"  # the model to train
    kills: int = 10  # number of kills, at random times
    seed: int = 0  # of these times
    folder: Path | None = None  # for both runs; by default a new temporary folder
    json: Path | None = None  # write the figures to this file


def lines(run: Path) -> list[dict]:
    """The run's metrics without those of the clock."""
    return [{k: v for k, v in line.items() if k not in _CLOCK} for line in metrics.read(run)]


def train(preset: str, run: Path, flags: list[str], seconds: float = math.inf) -> tuple[int, float]:
    """Runs train.py and kills it after `seconds`. Returns its exit code (-9 if killed) and the seconds until its first
    line of metrics."""
    command = [sys.executable, str(_ROOT / "train.py"), preset, "--workdir", str(run), *flags]
    path, start, first = run / "metrics.jsonl", time.monotonic(), math.inf
    with (
        (run.parent / f"{run.name}.log").open("a") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            time.sleep(0.01)
            elapsed = time.monotonic() - start
            if first == math.inf and path.exists() and path.stat().st_size:
                first = elapsed
            if elapsed > seconds:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return process.returncode, first


def main() -> int:
    """Trains twice, once undisturbed and once killed, and prints the final figures of both."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    options, flags = cli.parse(KillBenchmark(), argv[:at], prog="kill_and_resume.py"), argv[at + 1 :]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    undisturbed, killed = folder / "undisturbed", folder / "killed"

    begin = time.monotonic()
    code, first_line = train(options.preset, undisturbed, flags)
    training = time.monotonic() - begin - first_line
    begin = time.monotonic()
    code = code or train(options.preset, undisturbed, flags)[0]  # a finished run starts, restores and ends
    start_up = time.monotonic() - begin
    times, killed_at = random.Random(options.seed), []
    while code == 0 and len(killed_at) < options.kills:
        # A kill may come during start-up or restore. None is so late that the run could end before its last kill.
        done = max((line["step"] for line in lines(killed)), default=0) / lines(undisturbed)[-1]["step"]
        share = 1.8 * training * (1 - done) / (options.kills - len(killed_at) + 1)
        if train(options.preset, killed, flags, times.uniform(start_up / 2, start_up + share))[0] != -signal.SIGKILL:
            break
        killed_at.append(max((line["step"] for line in lines(killed)), default=0))
    code = code or train(options.preset, killed, flags)[0]
    if code:
        print(f"train.py ended with exit code {code}; see the logs in {folder}", file=sys.stderr)
        return 1

    if len(killed_at) < options.kills:
        print(f"the run ended after {len(killed_at)} kills; raise --tokens", file=sys.stderr)
        return 1

    a, b = lines(undisturbed), lines(killed)
    figures = {
        "kills": len(killed_at),
        "last_logged_step_at_each_kill": killed_at,
        "steps": a[-1]["step"],
        "lines_compared": len(a),
        "identical": a == b,
    }
    table = rich.table.Table("at the end", "undisturbed", f"killed {len(killed_at)} times")
    for name in ("nll", "held_out_nll", "held_out_bits_per_byte"):
        ends = [[line[name] for line in run if name in line][-1] for run in (a, b)]
        figures[name] = ends
        table.add_row(name, *map(repr, ends))
    console = rich.console.Console()
    console.print(table)
    console.print(f"last step logged at each kill: {killed_at} of {figures['steps']}")
    console.print(f"{len(a)} lines of metrics: {'bit for bit identical' if a == b else 'DIFFERENT'}; runs in {folder}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if a == b else 1


if __name__ == "__main__":
    cli.main(main)
