"""Restricts this process, then runs untrusted code: the child of `supervisor.py` and `worker.py`.

    python -I CHILD SETTINGS      SETTINGS is JSON; the current folder is the scratch folder

A program runs as `__main__`. With tests there are two processes: one runs the program and then serves calls; the other
one runs the tests and exits with 0 if they pass. A worker serves calls of one function of a file.
"""

import _socket
import builtins
import importlib.util
import json
import os
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import remote
import restrict
import seccomp


def main() -> None:
    """Reads the settings, restricts the process and runs the code. Exits with the code of the program or tests."""
    settings = json.loads(sys.argv[1])
    sys.argv = ["program.py"]
    sys.dont_write_bytecode = True
    if settings["kind"] == "worker":
        function = _function(settings["file"], settings["function"])
        _restrict(settings)
        _serve_calls(function, settings["seconds"])
        return
    with open(settings["file"], encoding="utf-8") as file:
        _restrict(settings)
        text = file.read()
    if settings["kind"] == "program":
        _run(text, "__main__")
        return
    sys.set_int_max_str_digits(0)  # tests and program may exchange integers of any length
    lines = remote.Lines(settings["incoming"], settings["outgoing"])
    if settings["kind"] == "tests":
        _test(text, remote.RemoteProgram(lines))
    else:
        remote.serve(lines, _run(text, "program"))


def _restrict(settings: dict[str, Any]) -> None:
    worker = settings["kind"] == "worker"
    cpu_seconds = None if worker else settings["seconds"]
    restrict.resources(cpu_seconds, settings["memory"], settings["file_size"], settings["processes"])
    restrict.files(os.getcwd(), packages=worker)
    restrict.user(settings["user"])
    if worker:
        seccomp.load(seccomp.allowed_calls(os.getpid(), create=False))
        return
    restrict.die_with(settings["parent"])
    listener = seccomp.load(seccomp.creating_calls(), listener=True)
    control = _socket.socket(fileno=settings["control"])
    control.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", listener))])
    control.close()
    os.close(listener)  # only the supervisor may hold it, because the holder grants requests
    seccomp.load(seccomp.allowed_calls(os.getpid(), create=True))


def _run(text: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)  # in the sandbox
    return module.__dict__


def _test(text: str, program: remote.RemoteProgram) -> None:
    tests = compile(text, "tests.py", "exec", dont_inherit=True)
    exec(tests, {"__name__": "tests", "__builtins__": builtins} | program.names(sorted(_names(tests))))


def _names(code: types.CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


def _function(path: str, name: str) -> Callable[..., Any]:
    found = importlib.util.spec_from_file_location("answers", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)


def _serve_calls(function: Callable[..., Any], seconds: float) -> None:
    """Answers each line of arguments with a line of JSON, null if the function raises. A timeout ends the process."""
    lines = remote.Lines(0, os.dup(1))
    os.dup2(2, 1)  # keeps the function's output apart from the answers
    lines.send("ready")
    while True:
        try:
            arguments = lines.receive()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            value = function(*arguments)
        except Exception:
            value = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        lines.send(value)


if __name__ == "__main__":
    main()
