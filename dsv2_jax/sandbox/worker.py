"""Answers of a library that takes long to import, from locked-up processes that stay: texts of a model go to these.

For libraries that do not run what they are given. What does run it gets a process of its own (supervisor.py).
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dsv2_jax.sandbox.supervisor import CHILD, check_system, own_user

_START_SECONDS = 120.0
_WAIT = 10  # seconds on the clock for each second of CPU time, since cores are shared
_MEMORY = 1 << 30  # bytes of address space


class Workers:
    """Calls a function of a Python file in processes without files, network or other processes.

    Threads may share it: each call has a process of its own, which later calls use again. A call that takes more than
    `seconds` of CPU time, or 1 GiB, is answered with None, and so is one that raises. Arguments and results are JSON.
    """

    def __init__(self, file: Path, function: str, seconds: float):
        self._file, self._function, self._seconds = file, function, seconds
        self._idle: list[_Worker] = []
        os.register_at_fork(after_in_child=self._idle.clear)  # pipes have one reader

    def __call__(self, *arguments: Any) -> Any:
        """Raises RuntimeError where a process cannot be locked up."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._file, self._function, self._seconds)
        try:
            answer = worker.ask(arguments, _WAIT * self._seconds)
        except (EOFError, OSError, TimeoutError):
            worker.end()
            return None
        self._idle.append(worker)
        return answer


class _Worker:
    """One process. It ends when this one does: its input ends then."""

    def __init__(self, file: Path, function: str, seconds: float):
        check_system()
        settings = {
            "kind": "worker",
            "file": str(file),
            "function": function,
            "seconds": seconds,
            "memory": _MEMORY,
            "file_size": 0,
            "processes": None,
            "user": own_user(),
        }
        self._said = b""
        with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as folder:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(CHILD), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                self._receive(_START_SECONDS)
            except (EOFError, TimeoutError) as error:
                self.end()
                errors.seek(0)
                why = (errors.read().decode(errors="replace").strip().splitlines() or [str(error)])[-1]
                raise RuntimeError(f"{file.name} cannot be locked up on this system: {why}") from None

    def ask(self, arguments: Any, seconds: float) -> Any:
        """Raises EOFError or OSError when the process has ended, TimeoutError when the time is up."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), json.dumps(arguments).encode() + b"\n")
        return self._receive(seconds)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _receive(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        deadline, source = time.monotonic() + seconds, self._process.stdout.fileno()
        waiting = select.poll()
        waiting.register(source, select.POLLIN)
        while b"\n" not in self._said:
            if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"no answer in {seconds:g} s")
            said = os.read(source, 1 << 16)
            if not said:
                raise EOFError("the process has ended")
            self._said += said
        line, self._said = self._said.split(b"\n", 1)
        return json.loads(line)
