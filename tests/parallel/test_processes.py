"""Several processes are one run: the same bits as one process, also after a kill, a SIGTERM and on another mesh."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv2_jax.training import checkpoint, loop, metrics

ROOT = Path(__file__).parents[2]
STEPS, ROWS, LENGTH = 20, 8, 32
MESH = ["--mesh.fsdp", "2", "--mesh.expert", "4"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A small corpus of made-up sentences, and a tiny run on it of 20 steps with budgets that span devices."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["light", "water", "stone", "river", "small", "great", "house", "under", "never", "always", "quiet"]
    for i in range(60):
        sentences = (" ".join(rng.choice(words, 8)).capitalize() + "." for _ in range(20))
        (folder / f"{i}.txt").write_text(" ".join(sentences) + f" Page {i}.\n", encoding="utf-8")
    return [
        "--data.source", str(folder), "--data.folder", str(tmp_path_factory.mktemp("data")),
        "--data.held_out_fraction", "0.1", "--model.vocab_size", "320", "--model.moe.budget_sequences", "4",
        "--batch.size", str(ROWS), "--tokens", str(STEPS * ROWS * LENGTH), "--cadence.save", "7",
    ]  # fmt: skip


@contextlib.contextmanager
def training(run, flags, processes, devices):
    """train.py in so many processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for index in range(processes):
        command = [sys.executable, str(ROOT / "train.py"), "tiny", "--workdir", str(run), *flags]
        if processes > 1:
            command += ["--processes.coordinator", address, "--processes.count", str(processes)]
            command += ["--processes.index", str(index)]
        log = (run.parent / f"{run.name}.{index}.log").open("w+")
        started.append((subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log), log))
    try:
        yield [process for process, _ in started]
    finally:
        for process, log in started:
            process.kill()
            process.wait()
            log.close()


def output(run, index):
    return (run.parent / f"{run.name}.{index}.log").read_text()


def finish(run, flags, processes, devices):
    """Trains to the end; the metrics that do not depend on the clock."""
    with training(run, flags, processes, devices) as started:
        codes = [process.wait(timeout=400) for process in started]
    assert codes == [0] * processes, output(run, 0)
    clock = "tokens_per_second", "mfu"
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics.read(run)]


def disturb(run, flags, victim, number, step):
    """Sends a signal to one of two processes when `step` is logged; the exit codes, and the seconds until the end."""
    path = run / "metrics.jsonl"
    with training(run, flags, 2, 4) as started:
        while not (path.exists() and f'{{"step": {step}, ' in path.read_text()):
            assert all(process.poll() is None for process in started), output(run, 0)
            time.sleep(0.01)
        started[victim].send_signal(number)
        begin = time.monotonic()
        return [process.wait(timeout=100) for process in started], time.monotonic() - begin


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags):
    """One process with eight devices: its folder and its metrics."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, finish(run, flags + MESH, 1, 8)


def test_processes_killed_stopped_and_resumed_are_one_process(tmp_path, flags, alone):
    run = tmp_path / "run"
    codes, seconds = disturb(run, flags + MESH, 1, signal.SIGKILL, 9)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1 and seconds < 60
    assert "error: process 0 of 2 ends, for another one is gone" in output(run, 0)
    assert checkpoint.latest_step(run) == 7

    codes, _ = disturb(run, flags + MESH, 1, signal.SIGTERM, 11)
    assert codes == [loop.STOPPED] * 2
    assert checkpoint.latest_step(run) >= 11

    codes, seconds = disturb(run, flags + MESH, 0, signal.SIGKILL, 16)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, loop.STOPPED) and seconds < 60

    assert finish(run, flags + MESH, 4, 2) == alone[1]


@pytest.mark.parametrize(("mesh", "devices"), [(MESH, 8), ([], 1)], ids=["fsdp 2 expert 4", "one device"])
def test_a_run_goes_on_on_another_mesh(tmp_path, flags, mesh, devices):
    """Saved on one mesh, restored on another: the next losses are those of the run that stayed."""
    flags = [*flags, "--model.moe.budget_sequences", "1", "--optimizer.peak_lr", "0.001"]
    stayed = finish(tmp_path / "stayed", [*flags, "--mesh.fsdp", "8"], 1, 8)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "stayed", moved)
    shutil.rmtree(moved / "checkpoints" / str(STEPS))
    assert checkpoint.latest_step(moved) == 14
    lines = finish(moved, flags + mesh, 1, devices)
    assert [line["step"] for line in lines] == [line["step"] for line in stayed]
    for ours, theirs in zip(lines, stayed, strict=True):
        for name in {"loss", "nll", "held_out_nll"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), (theirs["step"], name)
