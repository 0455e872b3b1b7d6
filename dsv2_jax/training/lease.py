"""Ensures one run at a time in a run's folder: the first process of a run holds the file `lease` in it.

On one host a POSIX lock on the file decides. The kernel releases it whenever the process ends, and children do not
inherit it. Other hosts may not see the lock, for example on a mounted bucket, so the holder also rewrites the file
every `beat` seconds. A process on another host that finds a holder watches the file for `patience` seconds. If the
file changes, the holder is alive; otherwise it is gone. A holder that ends in this time releases the file. The hosts'
clocks are never compared.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from dsv2_jax.config import Config, check
from dsv2_jax.parallel import processes

P = ParamSpec("P")
T = TypeVar("T")
LOST = 2  # exit code when another run has taken over the folder: launchers do not restart after 2
_BYTES = 512  # size of the file, constant so that a reader never sees the end of an older text


def leased(train: Callable[Concatenate[Config, P], T]) -> Callable[Concatenate[Config, P], T]:
    """Wraps `train(config, ...)`: while it runs, this process (or the first of several) holds `config.workdir`.

    The wrapped function raises ValueError in all processes if another run holds the folder.
    """

    @functools.wraps(train)
    def held(config: Config, *args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            refusal = ""
            with processes.first_before_others("lease"):
                if processes.is_first():
                    try:
                        stack.enter_context(hold(config.workdir))
                    except ValueError as error:
                        refusal = str(error)
            refused = processes.agreed(bool(refusal))
            check(not refused, refusal or f"another run holds {config.workdir}; see the first process's message")
            return train(config, *args, **kwargs)

    return held


@contextlib.contextmanager
def hold(run: Path, beat: float = 10.0, patience: float = 90.0) -> Iterator[None]:
    """A context that holds the folder. Raises ValueError, after watching if needed, if another process holds it.

    beat: seconds between writes. patience: seconds to watch a holder on another host. It exceeds 60, because a mounted
    bucket may show a file's state of 60 seconds ago.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / "lease"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        before = _read(file)
        locked = _lock(file, run)
        if before and not (locked and before["host"] == _host()):
            _watch(run, before, beat, patience)
            _lock(file, run)  # reading the file again released the lock
        _write(file, 0)
        over = threading.Event()
        beating = threading.Thread(target=_beat, args=(run, file, over, beat), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            os.ftruncate(file, 0)
    finally:
        os.close(file)  # releases the lock


def _lock(file: int, run: Path) -> bool:
    """Locks the file; False on a file system without locks. Raises ValueError if another process has the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        check(error.errno not in (errno.EACCES, errno.EAGAIN), _refusal(run, _read(file)))
        return False
    return True


def _watch(run: Path, before: dict[str, Any], beat: float, patience: float) -> None:
    """Returns when the holder has released the file or is gone. Raises ValueError if it is alive."""
    note = f"{_name(before)} holds {run}, or was killed there; waiting {patience:g} seconds to find out"
    print(note, file=sys.stderr, flush=True)
    end, now = time.monotonic() + patience, before
    while time.monotonic() < end:
        time.sleep(beat / 2)
        file = os.open(run / "lease", os.O_RDONLY)  # NFS checks for changes when a file is opened
        try:
            now = _read(file)
        finally:
            os.close(file)
        if not now:
            return
    check(now == before, _refusal(run, now))


def _beat(run: Path, file: int, over: threading.Event, seconds: float) -> None:
    number = 0
    while not over.wait(seconds):
        number += 1
        try:
            found = _read(file)
            lost = (found.get("host"), found.get("process")) != (_host(), os.getpid())
            if not lost:
                _write(file, number)
        except OSError as error:  # a shared disk may fail for a while; the handle of a replaced file is stale
            found, lost = {}, error.errno == errno.ESTALE
        if lost:
            by = _name(found) if found else "another process"
            print(f"error: {by} took over {run} while this run was suspended", file=sys.stderr, flush=True)
            os._exit(LOST)  # a normal exit would save over the other run's files


def _read(file: int) -> dict[str, Any]:
    """The holder's entry; {} if there is no holder."""
    text = os.pread(file, _BYTES, 0).strip()
    try:
        return json.loads(text) if text else {}
    except ValueError:  # foreign or damaged: treated as held by another host
        return {"host": "unknown", "process": "unknown"}


def _write(file: int, beat: int) -> None:
    os.pwrite(file, json.dumps({"host": _host(), "process": os.getpid(), "beat": beat}).ljust(_BYTES).encode(), 0)
    os.fsync(file)


@functools.cache
def _host() -> str:
    """Identifies the host, its boot and its process namespace.

    Processes for which this is equal see each other's locks and process ids.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host'].split()[0]}"


def _refusal(run: Path, holder: dict[str, Any]) -> str:
    by = _name(holder) if holder else "another process"
    return f"{run} is in use by {by}, which trains there; stop it, or choose another --workdir"
