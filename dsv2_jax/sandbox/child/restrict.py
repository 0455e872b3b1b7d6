"""Irrevocably restricts this process: files, user, capabilities and resources."""

import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig

_PARENT_DEATH_SIGNAL, _KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 1, 8, 38  # of prctl(2)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock(7), the same numbers on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_FOLDER, _REMOVE_FILE, _MAKE_FOLDER, _MAKE_FILE, _MAKE_LINK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_MOVE = 1 << 13  # LANDLOCK_ACCESS_FS_REFER
_SCRATCH = (
    _WRITE_FILE | _READ_FILE | _READ_FOLDER | _TRUNCATE | _MOVE
    | _REMOVE_FOLDER | _REMOVE_FILE | _MAKE_FOLDER | _MAKE_FILE | _MAKE_LINK
)  # fmt: skip
_CAPABILITIES_VERSION, _DAC_READ_SEARCH = 0x20080522, 1 << 2  # of capabilities(7)
_LIBC = ctypes.CDLL(None, use_errno=True)


def files(scratch: str, *, packages: bool) -> None:
    """Allows writing in `scratch` and reading Python's own files, nothing else. Raises OSError without Landlock.

    packages: also allow reading the installed packages. Older versions of Landlock lack rights for truncation (version
    3), TCP (4), ioctl on devices (5), or signals and abstract sockets (6). There only the system call filter applies.
    """
    version = _syscall(_CREATE_RULESET, None, 0, 1)
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    handled = struct.pack("QQQ", known, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _syscall(_CREATE_RULESET, handled, len(handled), 0)
    rights = {path: _READ_FILE | _READ_FOLDER for path in _python(packages) if os.path.isdir(path)}
    rights |= {"/dev/null": _READ_FILE | _WRITE_FILE | _TRUNCATE, scratch: _SCRATCH}
    for path, allowed in rights.items():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed & known, place), 0)
        os.close(place)
    _check(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def user(number: int | None) -> None:
    """Changes to the user `number`, if any, and drops all capabilities.

    If that user cannot read Python's own files, such as a Python in /root, the capability to read any file is kept.
    Landlock still limits which files are read.
    """
    folders = [path for path in sys.path if os.path.isdir(path)]
    if number is not None:
        _check(_LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0))
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
    kept = 0 if number is None or all(os.access(path, os.R_OK | os.X_OK) for path in folders) else _DAC_READ_SEARCH
    header = struct.pack("Ii", _CAPABILITIES_VERSION, 0)
    _check(_LIBC.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)))


def resources(seconds: int | None, memory: int, file_size: int, processes: int | None) -> None:
    """Limits CPU seconds, bytes of address space, bytes of a file, and the threads of the user (None: no limit)."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if seconds is not None:
        limits[resource.RLIMIT_CPU] = seconds
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def die_with(parent: int) -> None:
    """Ends this process when the thread that started it ends. parent: the process id of that thread."""
    _check(_LIBC.prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def _python(packages: bool) -> set[str]:
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/usr/lib", "/lib", "/lib64"}
    return own | (set(sys.path) if packages else set())


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _check(_LIBC.syscall(ctypes.c_long(number), *arguments))
