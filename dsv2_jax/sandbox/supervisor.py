"""Runs untrusted programs, such as those that a model wrote, in a sandbox.

Each program runs in a process that restricts itself (`child/`): it has a scratch folder, but no other files, no network
and no other processes. The supervisor enforces the limits that a process cannot set for itself: wall time, output, and
the number of files, folders and threads created. For the last ones the kernel notifies it (seccomp_unotify(2)).
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv2_jax.sandbox.child import seccomp

CHILD = Path(__file__).with_name("child")
_MAX_OUTPUT = 1 << 16  # bytes of output to keep
_MAX_CREATED, _MAX_FILE = 256, 1 << 20  # files and folders, bytes of a file: a scratch folder holds at most 256 MiB
_MAX_THREADS = 1024
_USERS = range(61184, 65520)  # ids that Linux distributions reserve for dynamic service users
# The capabilities to give a folder to another user, empty it, kill a process of that user, and become that user: CHOWN,
# DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID of capabilities(7).
_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # of seccomp_unotify(2)
_numbers = itertools.count(os.getpid())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a program. code: the exit code, minus the signal that ended it, or None after a timeout."""

    code: int | None
    output: str  # the beginning of stdout and stderr


def run(program: str, *, seconds: float = 5.0, memory: int = 1 << 29, text_in: str = "") -> RunResult:
    """Runs Python source in a sandbox: a scratch folder, no other files, no network, no other processes.

    Limits: `seconds` of wall time and about as much CPU time, `memory` bytes, and 256 files and folders of at most
    1 MiB each. Raises RuntimeError if the system has no sandbox, which needs Linux 5.13 with Landlock, and seccomp on
    x86-64 or 64-bit ARM.
    """
    check_system()
    return _run(program, seconds, memory, text_in)


def judge(program: str, tests: str, *, seconds: float = 5.0, memory: int = 1 << 29) -> RunResult:
    """Runs Python source and its tests in two sandboxes. The code is 0 if the tests pass.

    The tests are source that fails by raising. They use the program's names as if they followed it. Their calls run in
    the process of the program, and they compare copies (`child/remote.py`), so the program cannot make them pass by
    changing its own process. Raises RuntimeError as `run` does.
    """
    check_system()
    to_program, to_tests = os.pipe(), os.pipe()
    ends = {"tests": (to_tests[0], to_program[1]), "serve": (to_program[0], to_tests[1])}
    with contextlib.ExitStack() as stack:
        try:
            children = [
                stack.enter_context(_Child(kind, text, seconds, memory, ends=ends[kind]))
                for kind, text in (("tests", tests), ("serve", program))
            ]
        finally:
            for end in (*to_program, *to_tests):
                os.close(end)
        return _supervise(children, seconds)


@functools.cache
def check_system() -> None:
    """Runs an empty program in the sandbox. Raises RuntimeError if that is impossible."""
    why = f"no sandbox for {sys.platform} on {platform.machine()}"
    if sys.platform == "linux" and platform.machine() in seccomp.ARCHITECTURES:
        harmless = _run("", 30.0, 1 << 29, "")
        if harmless.code == 0:
            return
        why = (harmless.output.strip().splitlines() or ["timeout"])[-1]
    raise RuntimeError(f"this system cannot sandbox programs (Linux 5.13 with Landlock is required): {why}")


def _run(program: str, seconds: float, memory: int, text_in: str) -> RunResult:
    with _Child("program", program, seconds, memory, text_in=text_in) as child:
        return _supervise([child], seconds)


def _supervise(children: Sequence["_Child"], seconds: float) -> RunResult:
    """Serves all children until the first one ends or the time is up. Returns the result of the first."""
    first, deadline = children[0], time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        handlers = {descriptor: handler for child in children for descriptor, handler in child.watched().items()}
        waiting = select.poll()
        for descriptor in (first.ended, *handlers):
            waiting.register(descriptor, select.POLLIN)
        ready = dict(waiting.poll(left * 1000))
        for descriptor in ready.keys() & handlers.keys():
            handlers[descriptor](ready[descriptor])
        if first.ended in ready:
            return first.result()
    return dataclasses.replace(first.result(), code=None)


def own_user() -> int | None:
    """A new user id for a child; None if this process may not change users."""
    return _USERS[next(_numbers) % len(_USERS)] if _can_change_users() else None


@functools.cache
def _can_change_users() -> bool:
    """Root may lack capabilities in a container, or these ids in a small user namespace."""
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    if ~int(held.split()[1], 16) & _CAPABILITIES:
        return False
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.chown(file.name, _USERS[0], _USERS[0])
        except OSError:
            return False
        return True


class _Child:
    """A sandboxed process, its folder and its file descriptors."""

    def __init__(
        self,
        kind: str,
        text: str,
        seconds: float,
        memory: int,
        *,
        text_in: str = "",
        ends: tuple[int, ...] = (),
    ):
        self._folder = Path(tempfile.mkdtemp())
        self._left = {"files": _MAX_CREATED, "threads": _MAX_THREADS}
        self._printed = bytearray()
        self._output: int | None
        self._listener: int | None = None
        self._clone = seccomp.CHECKED["clone"][seccomp.column()]
        source, given, scratch = (self._folder / name for name in ("program.py", "input", "scratch"))
        source.write_text(text, encoding="utf-8", errors="replace")
        given.write_text(text_in, encoding="utf-8", errors="replace")
        scratch.mkdir()
        user = own_user()
        if user is not None:
            self._folder.chmod(0o711)  # lets its user reach the scratch folder
            source.chmod(0o600)
            os.chown(scratch, user, user)
        self._control, theirs = socket.socketpair()
        self._output, output = os.pipe()
        settings = {
            "kind": kind,
            "file": str(source),
            "seconds": int(seconds) + 1,
            "memory": memory,
            "file_size": _MAX_FILE,
            "processes": None if user is None else _MAX_THREADS,
            "user": user,
            "parent": os.getpid(),
            "control": theirs.fileno(),
            "incoming": ends[0] if ends else None,
            "outgoing": ends[1] if ends else None,
        }
        with given.open("rb") as file, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(CHILD), json.dumps(settings)],
                stdin=file,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env={"TMPDIR": str(scratch), "MALLOC_ARENA_MAX": "1"},  # each arena takes 64 MiB of `memory`
                pass_fds=(theirs.fileno(), *ends),
                start_new_session=True,
            )
        os.close(output)
        self.ended = os.pidfd_open(self._process.pid)

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._control.close()
        for descriptor in (self._output, self.ended, self._listener):
            if descriptor is not None:
                os.close(descriptor)
        remove(self._folder)

    def watched(self) -> dict[int, Callable[[int], None]]:
        """The descriptors to poll, each with the function that handles its poll(2) events."""
        found = {self._output: self._read, self._control.fileno(): self._receive, self._listener: self._answer}
        return {descriptor: handler for descriptor, handler in found.items() if descriptor not in (None, -1)}

    def result(self) -> RunResult:
        """Ends the process if it still runs, and returns its result."""
        self._kill()
        while self._output is not None:
            self._read(select.POLLIN)
        return RunResult(code=self._process.returncode, output=self._printed.decode(errors="replace"))

    def _kill(self) -> None:
        """Kills the process. It cannot have started others."""
        self._process.kill()
        self._process.wait()

    def _read(self, _: int) -> None:
        assert self._output is not None
        data = os.read(self._output, _MAX_OUTPUT)
        self._printed += data[: _MAX_OUTPUT - len(self._printed)]
        if not data:
            os.close(self._output)
            self._output = None

    def _receive(self, _: int) -> None:
        """Receives the descriptor of the kernel's notifications; there is none if the child failed earlier."""
        descriptors = socket.recv_fds(self._control, 1, 1)[1]
        self._control.close()
        self._listener = descriptors[0] if descriptors else None

    def _answer(self, events: int) -> None:
        """Allows the child to create a file, folder or thread, or denies it when the limit is reached."""
        assert self._listener is not None
        if not events & select.POLLIN:  # the child has ended; receiving would block forever
            os.close(self._listener)
            self._listener = None
            return
        notification = bytearray(80)  # struct seccomp_notif
        with contextlib.suppress(FileNotFoundError):  # the child was killed in between
            fcntl.ioctl(self._listener, _RECEIVE, notification)
            identity, call = struct.unpack_from("=Q8xi", notification)
            what, error = ("threads", errno.EAGAIN) if call == self._clone else ("files", errno.ENOSPC)
            self._left[what] -= 1
            answer = (-error, 0) if self._left[what] < 0 else (0, _CONTINUE)
            fcntl.ioctl(self._listener, _SEND, struct.pack("=QqiI", identity, 0, *answer))


def remove(folder: Path) -> None:
    """Removes a folder of any depth and with any modes. No other process may use it.

    Moves inner folders to the top and empties them there, to avoid recursion and long paths.
    """
    numbers = itertools.count()
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def empty(inside: int) -> list[str]:
        with os.scandir(inside) as found:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
        moved = []
        for name, is_folder in entries:
            if is_folder:
                os.chmod(name, 0o700, dir_fd=inside)
                moved.append(f"emptied-{next(numbers)}")
                os.rename(name, moved[-1], src_dir_fd=inside, dst_dir_fd=top)
            else:
                os.unlink(name, dir_fd=inside)
        return moved

    try:
        left = empty(top)
        while left:
            name = left.pop()
            inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                left += empty(inside)
            finally:
                os.close(inside)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    folder.rmdir()
