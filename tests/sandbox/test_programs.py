"""What a program in the sandbox can do, and what it tries in vain."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dsv2_jax import sandbox
from dsv2_jax.sandbox import supervisor
from dsv2_jax.sandbox.child import seccomp

ROOT = Path(__file__).parents[2]
ORDINARY = [
    # modules that programs import
    """
import abc, argparse, array, ast, asyncio, base64, bisect, calendar, cmath, collections, concurrent.futures, contextlib
import copy, csv, ctypes, dataclasses, datetime, decimal, difflib, enum, fractions, functools, gc, hashlib, heapq, html
import importlib, inspect, io, ipaddress, itertools, json, logging, math, multiprocessing, numbers, operator, pathlib
import pickle, platform, pprint, queue, random, re, secrets, select, shutil, signal, sqlite3, statistics, string, struct
import subprocess, sys, tempfile, textwrap, threading, time, timeit, traceback, types, typing, unicodedata, unittest
import urllib.parse, uuid, weakref, xml.etree.ElementTree, zlib
assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
assert hashlib.sha256(b"").hexdigest().startswith("e3b0") and zlib.decompress(zlib.compress(b"x" * 99)) == b"x" * 99
assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3") and uuid.uuid4() and secrets.token_hex() and random.random()
assert re.fullmatch(r"(\\w+)@(\\w+)", "a@b").groups() == ("a", "b") and datetime.datetime.now().year > 2000
assert platform.machine() and (os := __import__("os")).cpu_count() and os.times() and os.uname() and os.urandom(8)
""",
    # files in the scratch folder
    """
import json, os, pathlib, shutil, tempfile
open("note", "w").write("kept"); open("note", "a").write("!")
assert open("note").read() == "kept!" and os.stat("note").st_size == 5 and os.path.exists("note")
with open("note", "r+") as file: file.truncate(2); file.seek(0); assert file.read() == "ke"
os.makedirs("a/b/c"); pathlib.Path("a/b/c/x.json").write_text(json.dumps([1]))
assert [files for _, _, files in os.walk("a")] == [[], [], ["x.json"]]
os.rename("a/b/c/x.json", "a/b/c/y.json"); shutil.copyfile("note", "a/copy"); os.symlink("note", "link")
assert os.readlink("link") == "note" and open("link").read() == "ke" and sorted(os.listdir("a")) == ["b", "copy"]
shutil.rmtree("a"); os.remove("note"); assert os.listdir(".") == ["link"] and os.getcwd()
with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
    file.write(b"x"); file.flush(); assert os.listdir(folder)
with open(os.devnull, "w") as file: print("nothing", file=file)
""",
    # threads, waiting, signals to itself
    """
import concurrent.futures, os, queue, select, signal, threading, time
with concurrent.futures.ThreadPoolExecutor(16) as pool: assert sum(pool.map(lambda n: n * n, range(100))) == 328350
lock, found = threading.Lock(), []
threads = [threading.Thread(target=lambda: (lock.acquire(), found.append(1), lock.release())) for _ in range(20)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]; assert len(found) == 20
start = time.perf_counter(); time.sleep(0.05); assert time.perf_counter() - start >= 0.05
ends = os.pipe(); os.write(ends[1], b"x"); assert select.select([ends[0]], [], [], 1)[0] and os.read(ends[0], 1) == b"x"
called = []
signal.signal(signal.SIGUSR1, lambda *_: called.append(1)); signal.signal(signal.SIGALRM, lambda *_: called.append(2))
signal.raise_signal(signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR1); signal.alarm(1)
while 2 not in called: signal.pause()
assert called == [1, 1, 2]
""",
    # deep recursion, large numbers, much memory
    """
import sys, threading
sys.setrecursionlimit(10**6); threading.stack_size(1 << 27)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
found = []; thread = threading.Thread(target=lambda: found.append(depth(50_000))); thread.start(); thread.join()
assert found == [50_000] and len(bytearray(100 << 20)) == 100 << 20
sys.set_int_max_str_digits(0); assert len(str(7**20_000)) == 16902
""",
    # limits can be read, output can be thrown away
    """
import contextlib, io, os, resource, sys
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64 and resource.getrusage(resource.RUSAGE_SELF).ru_utime >= 0
with contextlib.redirect_stdout(io.StringIO()) as said: print("x")
assert said.getvalue() == "x\\n" and not sys.stdin.isatty()
assert os.getpid() != os.getppid() and os.getgroups() is not None
""",
]


@pytest.mark.parametrize("program", ORDINARY, ids=["modules", "files", "threads", "sizes", "facts"])
def test_ordinary_programs_run(program):
    outcome = sandbox.run(program, seconds=30)
    assert outcome == sandbox.RunResult(code=0, output="")


def test_what_a_program_prints_and_how_it_ends():
    program = "import math; print(input(), math.factorial(10))"
    assert sandbox.run(program, text_in="hello\n") == sandbox.RunResult(code=0, output="hello 3628800\n")
    assert sandbox.run("import sys; sys.exit(7)").code == 7
    assert sandbox.run("import os; os.abort()").code == -signal.SIGABRT
    failed = sandbox.run("assert 1 == 2")
    assert failed.code == 1 and "AssertionError" in failed.output
    assert sandbox.run("for _ in range(300): print('x' * 999)").output == ("x" * 999 + "\n") * 65 + "x" * 536


@pytest.mark.parametrize(
    "program",
    [
        "open('{secret}').read()",
        "import os; os.listdir('{folder}')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os; os.symlink('{secret}', 'link'); open('link').read()",
        "import os; os.link('{secret}', 'link'); open('link').read()",
        "import os; os.rename('{secret}', 'here'); open('here').read()",
        "import os; os.remove('{secret}')",
        "open('{folder}/new', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/cat', ['cat', '{secret}'])",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
        "import ctypes; ctypes.CDLL('{secret}')",
        "x = bytearray(1 << 30)",
        "f = open('large', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))",
    ],
)
def test_forbidden_calls_fail_without_harm(program, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        called = threading.Event()

        def listen():
            try:
                server.accept()
                called.set()
            except OSError:
                pass  # closed at the end

        threading.Thread(target=listen, daemon=True).start()
        places = {"secret": secret, "folder": tmp_path, "port": server.getsockname()[1]}
        outcome = sandbox.run(program.format(**places))
        assert not called.is_set()
    assert outcome.code not in (0, None)
    assert (
        any(said in outcome.output for said in ("PermissionError", "MemoryError", "OSError", "not allowed"))
        or outcome.code < 0
    )
    assert "the secret" not in outcome.output
    assert secret.read_text() == "the secret" and [p.name for p in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 1000)"]
)
def test_time_ends(program):
    start = time.monotonic()
    outcome = sandbox.run(program, seconds=1.0)
    assert outcome.code != 0
    assert time.monotonic() - start < 5
    assert len(outcome.output) <= 1 << 16


def test_memory_is_bounded_over_many_threads():
    program = """
import threading
def fill():
    kept = []
    while True: kept.append(bytearray(1 << 20))
threads = [threading.Thread(target=fill) for _ in range(8)]
for t in threads: t.start()
"""
    assert "MemoryError" in sandbox.run(program, seconds=10, memory=1 << 28).output


_CALL = """
import ctypes, fcntl, os, signal, struct, time
libc, parent = ctypes.CDLL(None, use_errno=True), os.getppid()
def call(x86, arm, *arguments):
    number = x86 if os.uname().machine == "x86_64" else arm
    found = libc.syscall(ctypes.c_long(number), *arguments)
    if found < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
info = (ctypes.c_int * 32)(signal.SIGUSR1, 0, -1)  # si_code: SI_QUEUE
pipe = os.pipe()
"""
_TRIES = {
    "truncate": "os.truncate('{file}', 0)",
    "chmod": "os.chmod('{file}', 0o600)",
    "fchmodat2": "call(452, 452, -100, b'{file}', 0o600, 0)",
    "chown": "os.chown('{file}', os.getuid(), 12345)",
    "lchown": "os.lchown('{file}', -1, 12345)",
    "utime": "os.utime('{file}', (1, 1))",
    "setxattr": "os.setxattr('{file}', 'user.x', b'y')",
    "truncating what is only read": "open('x', 'w'); os.open('x', os.O_RDONLY | os.O_TRUNC)",
    "rt_tgsigqueueinfo": "call(297, 240, parent, parent, signal.SIGUSR1, info)",
    "rt_sigqueueinfo": "call(129, 138, parent, signal.SIGUSR1, info)",
    "tgkill": "call(234, 131, parent, parent, signal.SIGUSR1)",
    "the group's signal": "os.kill(0, signal.SIGUSR1)",
    "F_SETOWN": (
        "fcntl.fcntl(pipe[0], fcntl.F_SETOWN, parent); fcntl.fcntl(pipe[0], 10, signal.SIGUSR1)\n"
        "fcntl.fcntl(pipe[0], fcntl.F_SETFL, os.O_ASYNC); os.write(pipe[1], b'x'); time.sleep(0.1)"
    ),
    "FIOSETOWN": "fcntl.ioctl(pipe[0], 0x8901, struct.pack('i', parent))",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, parent, 7)",
    "sched_setaffinity": "os.sched_setaffinity(parent, [0])",
    "sched_setscheduler": "os.sched_setscheduler(parent, os.SCHED_BATCH, os.sched_param(0))",
    "ioprio_set": "call(251, 30, 1, parent, 3 << 13)",
    "prlimit": "import resource; resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))",
    "msgget": "call(71, 188, call(68, 186, 0, 0o1600), 0, 0)",
    "semget": "call(66, 191, call(64, 190, 0, 1, 0o1600), 0, 0, 0)",
    "shmget": "call(31, 195, call(29, 194, 0, 4096, 0o1600), 0, 0)",
    "mknod": "os.mknod('device', 0o20666, os.makedev(1, 3))",
    "mkfifo": "os.mkfifo('fifo')",
    "root": "os.setuid(0); open('/etc/shadow').read()",
    "ptrace": "call(101, 117, 16, parent, 0, 0)",
    "pidfd_open": "call(434, 434, parent, 0)",
    "mount": "call(165, 40, b'none', b'.', b'tmpfs', 0, 0)",
    "a new user namespace": "call(272, 97, 0x10000000)",
    "clone3": "call(435, 435, (ctypes.c_long * 11)(), 88)",
    "bpf": "call(321, 280, 0, (ctypes.c_long * 16)(), 128)",
    "a call of tomorrow": "call(600, 600)",
    "x32's getpid": "call(0x40000027, 600)",
    "fork by clone": "call(56, 220, 17, 0, 0, 0, 0)",
    "vfork": "call(58, 600)",
    "shared memory": "import multiprocessing.shared_memory as m; m.SharedMemory(create=True, size=4096)",
    "an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + 'x')",
}


@pytest.mark.parametrize("name", _TRIES)
def test_a_system_call_that_is_not_on_the_list_fails_and_changes_nothing(name, request):
    # Anybody may do anything to this file, so that modes and owners are not what protects it.
    folder = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: supervisor.remove(folder))
    file = folder / "file"
    file.write_text("the secret")
    folder.chmod(0o777), file.chmod(0o666)
    signals = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    request.addfinalizer(lambda: signal.signal(signal.SIGUSR1, before))

    def state():
        facts = file.stat()
        own = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0)
        return file.read_text(), facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime, os.listxattr(file), own

    then = state()
    outcome = sandbox.run(_CALL + _TRIES[name].format(file=file))
    assert state() == then and not signals
    assert outcome.code == 1 and ("Error: [Errno" in outcome.output), outcome


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86")
def test_a_call_by_the_32_bit_interface_ends_the_program():
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000cd80c3"))  # getpid, number 20, by int 0x80
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    assert sandbox.run(program) == sandbox.RunResult(code=-signal.SIGSYS, output="")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_a_program_of_root_has_a_user_of_its_own():
    users = [sandbox.run("import os; print(os.getresuid(), os.getresgid(), os.getgroups())").output for _ in range(2)]
    assert users[0] != users[1]
    assert all(re.fullmatch(r"\((6\d{4}), \1, \1\) \(\1, \1, \1\) \[\]\n", said) for said in users)


def test_the_table_of_system_calls_is_that_of_the_kernels_headers():
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    if not all(map(os.path.exists, headers)):
        pytest.skip("the kernel's headers are not installed")
    for column, header in enumerate(headers):
        found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text())
        numbers = {name: int(number) for name, number in found}
        numbers.setdefault("newfstatat", numbers.get("fstatat"))
        for name, ours in (seccomp.ALLOWED | seccomp.CHECKED).items():
            assert ours[column] == numbers.get(name), name


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor n in range(10**6):\n    os.mkdir(str(n))",
        "import os\nwhile True:\n    try: os.mkdir('x' * 255); os.chdir('x' * 255)\n    except OSError: pass",
        "import os\nos.umask(0o777)\nfor n in range(10**6): os.mkdir(str(n))",
        "import os\nfor n in range(300):\n    with open(str(n), 'wb') as f: f.write(bytes(1 << 20))",
        "import os\nfor n in range(300):\n"
        "    f = os.open('.', os.O_TMPFILE | os.O_RDWR); os.write(f, bytes(1 << 20)); os.close(f)",
        "import os\nopen('x', 'w')\nfor n in range(300): os.link('x', f'x{n}'); os.symlink('x', f'y{n}')",
    ],
    ids=["folders", "deep folders", "closed folders", "files", "nameless files", "links"],
)
def test_the_scratch_folder_is_bounded_and_cleaned_up(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sizes = []
    monkeypatch.setattr(supervisor, "remove", lambda folder: (sizes.append(_size(folder)), _remove(folder)))
    start = time.monotonic()
    outcome = sandbox.run(program, seconds=3.0)
    assert time.monotonic() - start < 6
    assert outcome.code is None or "No space left on device" in outcome.output, outcome
    assert list(tmp_path.iterdir()) == []
    (size,) = sizes
    assert size <= 260 << 20


_remove = supervisor.remove


def _size(folder):
    found = subprocess.run(["du", "-sk", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(found.stdout.split()[0]) << 10


def test_a_program_ends_with_the_process_that_runs_it():
    command = [sys.executable, "-c", "from dsv2_jax import sandbox; sandbox.run('while True: pass', seconds=60)"]
    with subprocess.Popen(command, cwd=ROOT) as runs:
        children = Path(f"/proc/{runs.pid}/task/{runs.pid}/children")
        program = _soon(lambda: [pid for pid in children.read_text().split() if _is_running(pid)])[0]
        runs.kill()
    _soon(lambda: not _is_running(program))


def _is_running(pid):
    """Whether it has locked itself up: then it has two filters more than this process."""
    return os.path.exists(f"/proc/{pid}") and _filters(pid) == _filters("self") + 2


def _filters(pid):
    return int(re.findall(r"Seccomp_filters:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def _soon(condition):
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_threads_are_bounded():
    program = """
import _thread, os, time
_thread.stack_size(32768)
for n in range(100_000):
    try: _thread.start_new_thread(time.sleep, (60,))
    except RuntimeError: break
os.write(1, str(n).encode()); os._exit(0)
"""
    outcome = sandbox.run(program, seconds=60, memory=1 << 36)
    assert outcome.code == 0 and 900 < int(outcome.output) <= 1024


@pytest.mark.parametrize("mode", [0, 0o700])
def test_a_folder_of_any_depth_and_mode_is_removed(tmp_path, mode):
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = os.open(folder, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("x" * 200, dir_fd=inside)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0, dir_fd=inside))
        os.symlink("/", "link", dir_fd=inside)
        deeper = os.open("x" * 200, os.O_RDONLY, dir_fd=inside)
        os.fchmod(inside, mode)
        os.close(inside)
        inside = deeper
    os.close(inside)
    folder.chmod(0o700)
    supervisor.remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("module", "name", "value"), [(supervisor.sys, "platform", "darwin"), (platform, "machine", str)]
)
def test_a_system_without_a_sandbox_is_refused(module, name, value, monkeypatch):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(RuntimeError, match=r"this system cannot sandbox programs .*: no sandbox for"):
        supervisor.check_system.__wrapped__()
