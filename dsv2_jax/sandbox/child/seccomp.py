"""The seccomp filters: the allowed system calls, as BPF for x86-64 and 64-bit ARM.

The filter is an allowlist, so calls of newer kernels are refused. It is built here because pip cannot install
libseccomp. Two filters are loaded. The first one notifies the supervisor before the program creates a file, a folder or
a thread, which limits their number. The second one refuses every call outside the list with EPERM. The list has no
calls of other ABIs (32 bits, x32).
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence

# Call numbers on (x86-64, 64-bit ARM); None if the architecture does not have the call.
ALLOWED = {
    # open files and pipes
    "read": (0, 63), "write": (1, 64), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32), "ftruncate": (77, 46),
    "fallocate": (285, 47), "sendfile": (40, 71), "copy_file_range": (326, 285), "fadvise64": (221, 223),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    # paths; Landlock limits reading, writing, creating and removing
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "umask": (95, 166), "mkdir": (83, None), "mkdirat": (258, 34),
    "symlink": (88, None), "symlinkat": (266, 36), "link": (86, None), "linkat": (265, 37),
    # memory and threads
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "msync": (26, 227), "futex": (202, 98), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "exit": (60, 93), "exit_group": (231, 94), "getcpu": (309, 168),
    # signals to itself, and time
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102), "restart_syscall": (219, 128),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    # information
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
}  # fmt: skip
# Allowed with some arguments only; see `allowed_calls`.
CHECKED = {
    "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29), "kill": (62, 129), "tgkill": (234, 131),
    "prlimit64": (302, 261), "clone": (56, 220), "clone3": (435, 435),
}  # fmt: skip
CREATING = ("mkdir", "mkdirat", "symlink", "symlinkat", "link", "linkat")  # and openat with a flag of `_CREATE`
_SECCOMP = (317, 277)
_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, id in seccomp's data
_LOAD, _AND, _EQUAL, _ANY_BIT, _END = 0x20, 0x54, 0x15, 0x45, 0x06  # classic BPF
_ALLOW, _ASK, _KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
_REFUSE, _MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

_CREATE, _TRUNCATE, _ACCESS = 0o100 | 0o20000000, 0o1000, 3  # O_CREAT and O_TMPFILE; O_TRUNC; O_ACCMODE
_DUPLICATE_AND_FLAGS, _LOCKS, _PIPE_SIZE = (0, 1, 2, 3, 4, 1030), (5, 6, 7, 36, 37, 38), 1032  # commands of fcntl
_TERMINAL, _DESCRIPTOR = (0x5401, 0x802C542A, 0x5413), (0x5450, 0x5451, 0x541B, 0x5421)  # requests of ioctl
_THREAD, _OF_THREADS = 0x10000, 0x7D0F00  # CLONE_THREAD, and all flags that C libraries start threads with

Instruction = tuple[int, int, int, int]  # operation, jump offset if true, jump offset if false, operand
_LIBC = ctypes.CDLL(None, use_errno=True)


def column() -> int:
    """The column of this machine's architecture in the tables."""
    return ARCHITECTURES[platform.machine()][0]


def creating_calls() -> list[Instruction]:
    """The filter that notifies the supervisor before a file, a folder or a thread is created."""
    blocks = [_call(ALLOWED[name], [_end(_ASK)]) for name in CREATING]
    blocks.append(_call(CHECKED["clone"], [_end(_ASK)]))
    blocks.append(_call(CHECKED["openat"], [_low(2), (_ANY_BIT, 0, 1, _CREATE), _end(_ASK), _end(_ALLOW)]))
    return _filter(blocks, _ALLOW)


def allowed_calls(pid: int, *, create: bool) -> list[Instruction]:
    """The filter of allowed calls for the process `pid`. create: whether it may create files, folders and threads."""
    plain = [numbers for name, numbers in ALLOWED.items() if create or name not in CREATING]
    blocks = [_call(numbers, [_end(_ALLOW)]) for numbers in plain]
    # Before Linux 6.2, Landlock allows O_RDONLY | O_TRUNC to truncate any readable file.
    opening = [_low(2), (_ANY_BIT, 1, 0, _TRUNCATE), _end(_ALLOW), (_AND, 0, 0, _ACCESS), *_one_of((1, 2))]
    if not create:
        opening[1:1] = [(_ANY_BIT, 0, 1, _CREATE), _end(_REFUSE)]
    thread = [_low(0), (_ANY_BIT, 2, 0, 0xFFFFFFFF & ~_OF_THREADS), (_ANY_BIT, 0, 1, _THREAD), _end(_ALLOW)]
    reading_limits = [_low(0), (_EQUAL, 0, 4, 0), _low(2), (_EQUAL, 0, 2, 0), _high(2), (_EQUAL, 1, 0, 0)]
    rules = {
        "openat": opening,
        "fcntl": [_low(1), *_one_of((*_DUPLICATE_AND_FLAGS, *_LOCKS, _PIPE_SIZE))],
        "ioctl": [_low(1), *_one_of((*_TERMINAL, *_DESCRIPTOR))],
        "kill": [_low(0), *_one_of((pid,))],
        "tgkill": [_low(0), *_one_of((pid,))],
        "prlimit64": [*reading_limits, _end(_REFUSE), _end(_ALLOW)],
        "clone": [*thread, _end(_REFUSE)] if create else [_end(_REFUSE)],
        "clone3": [
            _end(_MISSING)
        ],  # its flags are in memory, out of reach of the filter; C libraries fall back to clone
    }
    blocks += [_call(CHECKED[name], body) for name, body in rules.items()]
    return _filter(blocks, _REFUSE)


def load(program: Sequence[Instruction], *, listener: bool = False) -> int:
    """Loads a filter permanently. With `listener`, returns the descriptor of its notifications.

    Raises OSError if the system has no seccomp, or if an outer filter already has a listener.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    flags = _NEW_LISTENER if listener else 0
    found = _LIBC.syscall(ctypes.c_long(_SECCOMP[column()]), ctypes.c_uint(_MODE_FILTER), ctypes.c_uint(flags), header)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return found


def _filter(blocks: list[list[Instruction]], otherwise: int) -> list[Instruction]:
    first = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[platform.machine()][1]), _end(_KILL), (_LOAD, 0, 0, 0)]
    return [*first, *(line for block in blocks for line in block), _end(otherwise)]


def _call(numbers: tuple[int | None, int | None], body: list[Instruction]) -> list[Instruction]:
    number = numbers[column()]
    return [] if number is None else [(_EQUAL, 0, len(body), number), *body]


def _low(argument: int) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _high(argument: int) -> Instruction:
    return (_LOAD, 0, 0, 20 + 8 * argument)


def _end(answer: int) -> Instruction:
    return (_END, 0, 0, answer)


def _one_of(values: Sequence[int]) -> list[Instruction]:
    return [line for value in values for line in ((_EQUAL, 0, 1, value), _end(_ALLOW))] + [_end(_REFUSE)]
