"""Two runs never train in one folder; a killed run does not block the next one."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import threading
import time

import pytest

from configs import PRESETS
from dsv2_jax import train
from dsv2_jax.alignment import grpo
from dsv2_jax.training import lease

HOLD = """
import sys, time
from pathlib import Path
from dsv2_jax.training import lease
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


quick = functools.partial(lease.hold, beat=0.05, patience=0.4)


@contextlib.contextmanager
def holder(run, seconds=60):
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run), str(seconds)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"](), workdir=tmp_path / "run")
    called = []
    with holder(config.workdir) as process:
        held = (config.workdir / "lease").read_text()
        assert json.loads(held)["process"] == process.pid
        with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on .*; stop it, or choose ano"):
            lease.leased(called.append)(config)
        for start in (train.train, grpo.train):
            with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
                start(config)
        assert [path.name for path in config.workdir.iterdir()] == ["lease"]
        assert not called and (config.workdir / "lease").read_text() == held
        process.kill()  # SIGKILL: nothing is given back, but the kernel drops the lock
        process.wait()
        begin = time.monotonic()
        lease.leased(called.append)(config)
        assert called == [config] and time.monotonic() - begin < 1
    assert (config.workdir / "lease").read_text() == ""


def test_an_orderly_end_gives_the_folder_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lease.hold(tmp_path):
            raise KeyError
    assert (tmp_path / "lease").read_text() == ""


def elsewhere(run, beat=0):
    """What a process of another host writes."""
    text = json.dumps({"host": "far 0 0", "process": 7, "beat": beat})
    (run / "lease").write_text(text.ljust(lease._BYTES))


def test_of_another_host_a_silent_holder_is_gone(tmp_path, capsys):
    elsewhere(tmp_path)
    with quick(tmp_path):
        assert "far" not in (tmp_path / "lease").read_text()
    assert "process 7 on far holds" in capsys.readouterr().err


def test_of_another_host_a_living_holder_is_left_alone(tmp_path):
    elsewhere(tmp_path)
    later = threading.Timer(0.15, elsewhere, (tmp_path, 1))
    later.start()
    with pytest.raises(ValueError, match="in use by process 7 on far"), quick(tmp_path):
        pass
    assert json.loads((tmp_path / "lease").read_text())["beat"] == 1


def test_of_another_host_a_holder_may_end_meanwhile(tmp_path):
    elsewhere(tmp_path)
    later = threading.Timer(0.15, (tmp_path / "lease").write_text, ("",))
    later.start()
    begin = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - begin < 0.4


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(lease.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "lockf", no_locks)
    with quick(tmp_path), pytest.raises(ValueError, match="is in use by"), quick(tmp_path):
        pass  # the first one beats, so the second sees a living holder, even of its own host
    with quick(tmp_path):
        pass


def test_who_was_taken_over_ends_at_once(tmp_path, monkeypatch, capsys):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(lease.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with quick(tmp_path):
        elsewhere(tmp_path)
        assert ended.wait(5)
    assert codes[0] == lease.LOST == 2
    assert "error: process 7 on far took over" in capsys.readouterr().err
