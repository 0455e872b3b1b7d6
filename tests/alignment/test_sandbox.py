"""What a program in the sandbox can do, and what it tries in vain."""

import socket
import threading
import time

import pytest

from dsv2_jax.alignment import sandbox


def test_a_harmless_program_runs():
    program = """
import math, json, threading, re, collections, random, tempfile, os
open("note", "w").write("kept"); assert open("note").read() == "kept"
done = []
thread = threading.Thread(target=lambda: done.append(1)); thread.start(); thread.join()
assert done
print(input(), math.factorial(10))
"""
    assert sandbox.run(program, text_in="hello\n") == sandbox.Outcome(code=0, output="hello 3628800\n")
    assert sandbox.run("import sys; sys.exit(7)").code == 7
    failed = sandbox.run("assert 1 == 2")
    assert failed.code == 1 and "AssertionError" in failed.output


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
def test_what_must_not_be_fails_and_harms_nothing(program, tmp_path):
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
