"""One run at a time in a run's folder: the first process of a run holds the file `lease` in it.

On one host a POSIX lock of the file decides: the kernel drops it when the process ends, however it ends, and no child
inherits it. Other hosts may not see the lock, as on a mounted bucket. For them the holder rewrites the file every
`beat` seconds. A process of another host that finds the file held watches it for `patience` seconds: time for a
holder that is ending to give it back. If it has changed by then, the holder lives; if not, it is gone. So no clocks
are compared.
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
from typing import Any, TypeVar

from dsv2_jax.config import Config, check
from dsv2_jax.parallel import processes

T = TypeVar("T")
LOST = 2  # exit code when another run has taken the folder over: to start again would not help
_BYTES = 512  # of the file, always as many: a reader never finds half of the old text after the new


def leased(train: Callable[[Config], T]) -> Callable[[Config], T]:
    """`train` while this process, or the first of several, holds `config.workdir`.

    Raises ValueError in all of them if another run holds it.
    """

    @functools.wraps(train)
    def held(config: Config) -> T:
        with contextlib.ExitStack() as stack:
            refusal = ""
            with processes.first_before_others("lease"):
                if processes.is_first():
                    try:
                        stack.enter_context(hold(config.workdir))
                    except ValueError as error:
                        refusal = str(error)
            refused = processes.agreed(bool(refusal))
            check(not refused, refusal or f"another run holds {config.workdir}; the first process says which")
            return train(config)

    return held


@contextlib.contextmanager
def hold(run: Path, beat: float = 10.0, patience: float = 90.0) -> Iterator[None]:
    """Holds the folder while entered. Raises ValueError, at once or after watching, if another process holds it.

    beat: seconds between writes. patience: seconds to watch a holder of another host; a mounted bucket may show a file
    as it was 60 seconds ago.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / "lease"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        before = _read(file)
        locked = _lock(file, run)
        if before and not (locked and before["host"] == _host()):
            _watch(run, before, beat, patience)
            _lock(file, run)  # reading the file once more has dropped the lock
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
        os.close(file)  # drops the lock


def _lock(file: int, run: Path) -> bool:
    """Locks the file; False where the file system knows no locks. Raises ValueError if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        check(error.errno not in (errno.EACCES, errno.EAGAIN), _refusal(run, _read(file)))
        return False
    return True


def _watch(run: Path, before: dict[str, Any], beat: float, patience: float) -> None:
    """Returns when the holder has given the file back or is gone; raises ValueError if it lives."""
    told = f"{run} is held by {_name(before)}, or was when that was killed; waiting {patience:g} seconds to see which"
    print(told, file=sys.stderr, flush=True)
    end, now = time.monotonic() + patience, before
    while time.monotonic() < end:
        time.sleep(beat / 2)
        file = os.open(run / "lease", os.O_RDONLY)  # anew: NFS looks for changes when a file is opened
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
        except OSError as error:  # a shared disk may fail for a while; of a file that was replaced the handle is stale
            found, lost = {}, error.errno == errno.ESTALE
        if lost:
            by = _name(found) if found else "another process"
            print(f"error: {by} has taken over {run} while this run stood still", file=sys.stderr, flush=True)
            os._exit(LOST)  # an orderly end would save over the other run's files


def _read(file: int) -> dict[str, Any]:
    """What the holder wrote; {} if there is none."""
    text = os.pread(file, _BYTES, 0).strip()
    try:
        return json.loads(text) if text else {}
    except ValueError:  # not ours, or damaged: as if another host held it
        return {"host": "unknown", "process": "unknown"}


def _write(file: int, beat: int) -> None:
    os.pwrite(file, json.dumps({"host": _host(), "process": os.getpid(), "beat": beat}).ljust(_BYTES).encode(), 0)
    os.fsync(file)


@functools.cache
def _host() -> str:
    """Name, boot and process namespace: where it is the same, locks are seen and process ids mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host'].split()[0]}"


def _refusal(run: Path, holder: dict[str, Any]) -> str:
    by = _name(holder) if holder else "another process"
    return f"{run} is in use by {by}, which trains there; stop it, or choose another --workdir"
