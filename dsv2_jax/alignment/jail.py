"""Shuts the door behind its own process, then runs a program: the child's side of `sandbox.py`.

    python -I jail.py PROGRAM SECONDS BYTES      in the scratch folder, which is all it can write

Landlock leaves it the scratch folder and, to read, Python's own files. A seccomp filter takes away sockets, other
processes and signals to them. Limits bound CPU time, memory, file size and open files. All of it is inherited and none
can be undone from inside.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import sysconfig

_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2  # of prctl(2)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # landlock(7), the same numbers on every architecture
_READ = 1 << 2 | 1 << 3  # LANDLOCK_ACCESS_FS_READ_FILE, READ_DIR
_ALL_FILES = (1 << 13) - 1  # every right of Landlock's first version
_WRITE = _ALL_FILES & ~1  # all of them but executing

# System calls by their numbers on (x86_64, aarch64); None where an architecture does not have one.
_DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "shmget": (29, 194), "memfd_create": (319, 279),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "chmod": (90, None), "fchmodat": (268, 53),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)  # threads may start, processes may not
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, name in seccomp's data
_LIBC = ctypes.CDLL(None, use_errno=True)


def restrict_files(scratch: str) -> None:
    """Leaves `scratch` to work in and Python's own files to read. Raises OSError where Landlock is missing."""
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/usr/lib", "/lib", "/lib64"}
    rights = {path: _READ for path in python if os.path.isdir(path)} | {scratch: _WRITE}
    rules = _syscall(_CREATE_RULESET, struct.pack("Q", _ALL_FILES), 8, 0)
    for path, allowed in rights.items():
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, folder), 0)
        os.close(folder)
    _check(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
    _syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def restrict_calls() -> None:
    """Answers the calls of `_DENIED`, and new processes, with "not permitted". Raises OSError without seccomp."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF's instructions
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x32's numbers
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (end, 0, 0, refuse)]
    program += [(equal, 0, 1, _CLONE3[column]), (end, 0, 0, missing)]  # its flags cannot be read; libc then uses clone
    program += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (end, 0, 0, refuse)]
    program += [(end, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    _check(_LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.create_string_buffer(whole), 0, 0))


def limit(seconds: int, memory: int) -> None:
    """Bounds CPU seconds and bytes of address space, and what can be written to a file."""
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 24),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _check(_LIBC.syscall(ctypes.c_long(number), *arguments))


def main() -> None:
    """Locks up, then runs the program as `__main__`."""
    path, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(path, encoding="utf-8") as file:
        program = compile(file.read(), "program.py", "exec", dont_inherit=True)
    limit(seconds, memory)
    restrict_files(os.getcwd())
    restrict_calls()
    sys.argv = ["program.py"]
    exec(program, {"__name__": "__main__", "__builtins__": __builtins__})  # what all of the above is for


if __name__ == "__main__":
    main()
