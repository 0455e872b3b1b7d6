"""Runs a program that nobody vouches for, such as a model wrote, and says how it ended."""

import dataclasses
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

_JAIL = Path(__file__).with_name("jail.py")
_MOST_OUTPUT = 1 << 16  # bytes that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended. code: its exit code, negative the signal that ended it, None when its time was up."""

    code: int | None
    output: str  # what it printed, errors included, the beginning of it


def run(program: str, *, seconds: float = 5.0, memory: int = 1 << 29, text_in: str = "") -> Outcome:
    """Runs Python source in a process of its own: no files but a scratch folder, no network, no other process.

    It has `seconds` of time and about as much of CPU time, and `memory` bytes. Raises RuntimeError where the system
    cannot lock it up: Linux with Landlock (5.13 or newer) on x86-64 or ARM is needed.
    """
    _check_system()
    return _run(program, seconds, memory, text_in)


@functools.cache
def _check_system() -> None:
    harmless = _run("", 30.0, 1 << 29, "")
    if harmless.code != 0:
        why = (harmless.output.strip().splitlines() or ["it takes too long"])[-1]
        raise RuntimeError(f"programs cannot be locked up on this system (Linux 5.13 with Landlock is needed): {why}")


def _run(program: str, seconds: float, memory: int, text_in: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        source, output, scratch = Path(folder) / "program.py", Path(folder) / "output", Path(folder) / "scratch"
        source.write_text(program, encoding="utf-8", errors="replace")
        scratch.mkdir()
        command = [sys.executable, "-I", "-X", "utf8", str(_JAIL), str(source), str(int(seconds) + 1), str(memory)]
        with output.open("wb") as file:
            try:
                done = subprocess.run(
                    command,
                    input=text_in.encode(),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=scratch,
                    env={},
                    timeout=seconds,
                    check=False,
                )
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = None
        with output.open("rb") as file:
            said = file.read(_MOST_OUTPUT).decode(errors="replace")
    return Outcome(code=code, output=said)
