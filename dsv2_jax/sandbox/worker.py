"""Sandboxed worker processes that stay alive, for library functions that take a model's text and are slow to import.

For libraries that do not execute their input. Code that is executed gets a new process each time (supervisor.py).
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
_WAIT = 10  # seconds of wall time per second of CPU time, because cores are shared
_MEMORY = 1 << 30  # bytes of address space


class Workers:
    """Calls a function of a Python file in processes without files, network or other processes.

    Thread-safe: concurrent calls use different processes, which later calls reuse. Returns None for a call that raises
    or takes more than `seconds` of CPU time or 1 GiB. Arguments and results are JSON values.
    """

    def __init__(self, file: Path, function: str, seconds: float):
        self._file, self._function, self._seconds = file, function, seconds
        self._idle: list[_Worker] = []
        os.register_at_fork(after_in_child=self._idle.clear)  # a forked child must not use the parent's pipes

    def __call__(self, *arguments: Any) -> Any:
        """Raises RuntimeError if the system has no sandbox."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._file, self._function, self._seconds)
        try:
            answer = worker.call(arguments, _WAIT * self._seconds)
        except (EOFError, OSError, TimeoutError):
            worker.end()
            return None
        self._idle.append(worker)
        return answer


class _Worker:
    """One worker process. It ends with this process, which closes its input."""

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
        self._received = b""
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
                raise RuntimeError(f"this system cannot sandbox {file.name}: {why}") from None

    def call(self, arguments: Any, seconds: float) -> Any:
        """Raises EOFError or OSError if the process has ended, TimeoutError after `seconds`."""
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
        while b"\n" not in self._received:
            if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"no answer in {seconds:g} s")
            data = os.read(source, 1 << 16)
            if not data:
                raise EOFError("the process has ended")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)
