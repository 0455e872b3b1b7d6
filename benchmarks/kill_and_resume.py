"""Kills a training run with SIGKILL at random moments, resumes it, and compares it to the bit with a run left alone.

    python benchmarks/kill_and_resume.py [--preset nano] [--kills 10] [--seed 0] [--json FILE] -- [TRAIN FLAGS ...]

Flags behind `--` go to train.py. Exit code 0 if every figure that does not depend on the clock agrees, else 1.
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
sys.path.insert(0, str(_ROOT))  # a script's own folder is where Python looks, not the one it is called from

from dsv2_jax import cli  # noqa: E402
from dsv2_jax.training import metrics  # noqa: E402

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


def train(preset: str, run: Path, flags: list[str], seconds: float = math.inf) -> tuple[int, float]:
    """Runs train.py, killed after `seconds`: its exit code (-9 if killed), and when its first line of metrics came."""
    command = [sys.executable, str(_ROOT / "train.py"), preset, "--workdir", str(run), *flags]
    path, start, first = run / "metrics.jsonl", time.monotonic(), math.inf
    with (
        (run.parent / f"{run.name}.log").open("a") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            time.sleep(0.01)
            passed = time.monotonic() - start
            if first == math.inf and path.exists() and path.stat().st_size:
                first = passed
            if passed > seconds:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return process.returncode, first


def main() -> int:
    """Trains twice, once in peace and once killed, and prints both ends."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    options, flags = cli.parse(Options(), argv[:at], prog="kill_and_resume.py"), argv[at + 1 :]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    peaceful, killed = folder / "left_alone", folder / "killed"

    begin = time.monotonic()
    code, first_line = train(options.preset, peaceful, flags)
    training = time.monotonic() - begin - first_line
    begin = time.monotonic()
    code = code or train(options.preset, peaceful, flags)[0]  # finished: starts, restores, and ends
    start_up = time.monotonic() - begin
    moments, died_at = random.Random(options.seed), []
    while code == 0 and len(died_at) < options.kills:
        # Moments of start-up and restore count too; none lies so late that the run could end before its last kill.
        done = max((line["step"] for line in lines(killed)), default=0) / lines(peaceful)[-1]["step"]
        share = 1.8 * training * (1 - done) / (options.kills - len(died_at) + 1)
        if train(options.preset, killed, flags, moments.uniform(start_up / 2, start_up + share))[0] != -signal.SIGKILL:
            break
        died_at.append(max((line["step"] for line in lines(killed)), default=0))
    code = code or train(options.preset, killed, flags)[0]
    if code:
        print(f"train.py ended with exit code {code}; see the logs in {folder}", file=sys.stderr)
        return 1

    if len(died_at) < options.kills:
        print(f"the run ended after {len(died_at)} kills; give it more --tokens", file=sys.stderr)
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
