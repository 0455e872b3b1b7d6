"""Runs programs that nobody vouches for, such as a model wrote, and says how they ended.

A program is a process of its own that locks itself up (`child/`): no files but a scratch folder, no network, no other
process. This side bounds what the child cannot bound itself: wall time, output, and how many files, folders and threads
are created, which the kernel asks about (seccomp_unotify(2)).
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
_MOST_OUTPUT = 1 << 16  # bytes that are kept
_MOST_CREATED, _LARGEST_FILE = 256, 1 << 20  # so a scratch folder holds 256 MiB at most
_MOST_THREADS = 1024
_USERS = range(61184, 65520)  # which Linux distributions leave to services without a user of their own
# To give away a folder, empty it again, end a process of another user, and become one: CHOWN, DAC_OVERRIDE, FOWNER,
# KILL, SETGID, SETUID of capabilities(7).
_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # of seccomp_unotify(2)
_numbers = itertools.count(os.getpid())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a program ended. code: its exit code, negative the signal that ended it, None when its time was up."""

    code: int | None
    output: str  # what it printed, errors included, the beginning of it


def run(program: str, *, seconds: float = 5.0, memory: int = 1 << 29, text_in: str = "") -> RunResult:
    """Runs Python source in a process of its own: no files but a scratch folder, no network, no other process.

    It has `seconds` of time and about as much of CPU time, and `memory` bytes. It can create 256 files and folders of
    at most 1 MiB each. Raises RuntimeError where the system cannot lock it up: Linux with Landlock (5.13 or newer) and
    seccomp on x86-64 or ARM is needed.
    """
    check_system()
    return _run(program, seconds, memory, text_in)


def judge(program: str, tests: str, *, seconds: float = 5.0, memory: int = 1 << 29) -> RunResult:
    """Runs Python source, then its tests, in two locked-up processes. The code is 0 if the tests pass.

    The tests, source that fails by raising, use the program's names as if they were behind it. What they call is
    called in the other process, and what they compare are copies (`child/remote.py`), so nothing that the program
    does to its own process makes them pass. Raises RuntimeError as `run` does.
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
    """Locks up a harmless program. Raises RuntimeError where that is impossible."""
    why = f"there is no sandbox for {sys.platform} on {platform.machine()}"
    if sys.platform == "linux" and platform.machine() in seccomp.ARCHITECTURES:
        harmless = _run("", 30.0, 1 << 29, "")
        if harmless.code == 0:
            return
        why = (harmless.output.strip().splitlines() or ["it takes too long"])[-1]
    raise RuntimeError(f"programs cannot be locked up on this system (Linux 5.13 with Landlock is needed): {why}")


def _run(program: str, seconds: float, memory: int, text_in: str) -> RunResult:
    with _Child("program", program, seconds, memory, text_in=text_in) as child:
        return _supervise([child], seconds)


def _supervise(children: Sequence["_Child"], seconds: float) -> RunResult:
    """Serves all of them until the first one ends or the time is up; its outcome."""
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
            return first.outcome()
    return dataclasses.replace(first.outcome(), code=None)


def own_user() -> int | None:
    """A user's number for a child, another one each time; None without the right to change users."""
    return _USERS[next(_numbers) % len(_USERS)] if _can_change_users() else None


@functools.cache
def _can_change_users() -> bool:
    """Containers may leave root few capabilities, and root of a small user namespace does not have these numbers."""
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
    """A locked-up process, its folder, and what the parent holds of it."""

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
        self._left = {"files": _MOST_CREATED, "threads": _MOST_THREADS}
        self._said = bytearray()
        self._output: int | None
        self._listener: int | None = None
        self._clone = seccomp.CHECKED["clone"][seccomp.column()]
        source, given, scratch = (self._folder / name for name in ("program.py", "input", "scratch"))
        source.write_text(text, encoding="utf-8", errors="replace")
        given.write_text(text_in, encoding="utf-8", errors="replace")
        scratch.mkdir()
        user = own_user()
        if user is not None:
            self._folder.chmod(0o711)  # its user may pass through to the scratch folder
            source.chmod(0o600)
            os.chown(scratch, user, user)
        self._control, theirs = socket.socketpair()
        self._output, output = os.pipe()
        settings = {
            "kind": kind,
            "file": str(source),
            "seconds": int(seconds) + 1,
            "memory": memory,
            "file_size": _LARGEST_FILE,
            "processes": None if user is None else _MOST_THREADS,
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
        """Descriptors to wait for, and what to do with the events of poll(2) that they have."""
        found = {self._output: self._read, self._control.fileno(): self._receive, self._listener: self._answer}
        return {descriptor: handler for descriptor, handler in found.items() if descriptor not in (None, -1)}

    def outcome(self) -> RunResult:
        """Ends it, if it has not ended."""
        self._kill()
        while self._output is not None:
            self._read(select.POLLIN)
        return RunResult(code=self._process.returncode, output=self._said.decode(errors="replace"))

    def _kill(self) -> None:
        """It cannot start processes, so nothing of it is left."""
        self._process.kill()
        self._process.wait()

    def _read(self, _: int) -> None:
        assert self._output is not None
        said = os.read(self._output, _MOST_OUTPUT)
        self._said += said[: _MOST_OUTPUT - len(self._said)]
        if not said:
            os.close(self._output)
            self._output = None

    def _receive(self, _: int) -> None:
        """The descriptor that the kernel's questions arrive at; none if the child failed before."""
        descriptors = socket.recv_fds(self._control, 1, 1)[1]
        self._control.close()
        self._listener = descriptors[0] if descriptors else None

    def _answer(self, events: int) -> None:
        """Lets the child create one more file, folder or thread, or answers that there is no room."""
        assert self._listener is not None
        if not events & select.POLLIN:  # it has ended; asking for a question would wait without end
            os.close(self._listener)
            self._listener = None
            return
        question = bytearray(80)  # struct seccomp_notif
        with contextlib.suppress(FileNotFoundError):  # the child was killed in between
            fcntl.ioctl(self._listener, _RECEIVE, question)
            identity, call = struct.unpack_from("=Q8xi", question)
            what, error = ("threads", errno.EAGAIN) if call == self._clone else ("files", errno.ENOSPC)
            self._left[what] -= 1
            answer = (-error, 0) if self._left[what] < 0 else (0, _CONTINUE)
            fcntl.ioctl(self._listener, _SEND, struct.pack("=QqiI", identity, 0, *answer))


def remove(folder: Path) -> None:
    """Removes a folder however deep it is, and whatever the modes in it. Nobody else may be at work in it.

    Folders in it are moved to its top and emptied there, so neither recursion nor the length of paths matters.
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
