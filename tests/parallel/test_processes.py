"""Runs of several processes equal those of one, also after a kill, after SIGTERM and on another mesh."""

import contextlib
import json
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
from conftest import COMPILE_FAST

from dsv2_jax.evaluation.tasks import sets
from dsv2_jax.training import loop, metrics, run_folder

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
    """Runs train.py in `processes` processes of `devices` devices each."""
    with started(run, ["train.py", "tiny", "--workdir", str(run), *flags], processes, devices) as those:
        yield those


@contextlib.contextmanager
def started(run, command, processes, devices):
    """Runs a script in `processes` processes of `devices` devices each, in the folder of `run`, which gets the logs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    those = []
    for index in range(processes):
        own = [sys.executable, str(ROOT / command[0]), *command[1:]]
        if processes > 1:
            own += ["--processes.coordinator", address, "--processes.count", str(processes)]
            own += ["--processes.index", str(index)]
        log = (run.parent / f"{run.name}.{index}.log").open("w+")
        those.append((subprocess.Popen(own, env=environment, cwd=run.parent, stdout=log, stderr=log), log))
    try:
        yield [process for process, _ in those]
    finally:
        for process, log in those:
            process.kill()
            process.wait()
            log.close()


def output(run, index):
    return (run.parent / f"{run.name}.{index}.log").read_text()


def finish(run, flags, processes, devices):
    """Trains to the end; the metrics that do not depend on the clock."""
    with training(run, flags, processes, devices) as those:
        codes = [process.wait(timeout=400) for process in those]
    assert codes == [0] * processes, output(run, 0)
    clock = "tokens_per_second", "mfu"
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics.read(run)]


def disturb(run, flags, victim, number, step):
    """Sends a signal to one of two processes when `step` is logged; the exit codes, and the seconds until the end."""
    path = run / "metrics.jsonl"
    with training(run, flags, 2, 4) as those:
        while not (path.exists() and f'{{"step": {step}, ' in path.read_text()):
            assert all(process.poll() is None for process in those), output(run, 0)
            time.sleep(0.01)
        those[victim].send_signal(number)
        begin = time.monotonic()
        return [process.wait(timeout=100) for process in those], time.monotonic() - begin


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags):
    """One process with eight devices: its folder and its metrics."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, finish(run, flags + MESH, 1, 8)


def test_processes_killed_stopped_and_resumed_are_one_process(tmp_path, flags, alone):
    run = tmp_path / "run"
    codes, seconds = disturb(run, flags + MESH, 1, signal.SIGKILL, 9)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1 and seconds < 60
    assert "error: process 0 of 2 exits because another process is gone" in output(run, 0)
    assert run_folder.latest_step(run) == 7

    codes, _ = disturb(run, flags + MESH, 1, signal.SIGTERM, 11)
    assert codes == [loop.STOPPED] * 2
    assert run_folder.latest_step(run) >= 11

    codes, seconds = disturb(run, flags + MESH, 0, signal.SIGKILL, 16)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, loop.STOPPED) and seconds < 60

    assert finish(run, flags + MESH, 4, 2) == alone[1]


@pytest.fixture(scope="module")
def stays(tmp_path_factory, flags):
    """A run on eight devices with one sequence per budget: its folder, its flags except the mesh, its metrics."""
    flags = [*flags, "--model.moe.budget_sequences", "1", "--optimizer.peak_lr", "0.001"]
    run = tmp_path_factory.mktemp("stays") / "run"
    return run, flags, finish(run, [*flags, "--mesh.fsdp", "8"], 1, 8)


@pytest.mark.parametrize(("mesh", "devices"), [(MESH, 8), ([], 1)], ids=["fsdp 2 expert 4", "one device"])
def test_a_run_goes_on_on_another_mesh(tmp_path, stays, mesh, devices):
    """Saved on one mesh, restored on another: the next losses are those of the run that stayed."""
    folder, flags, stayed = stays
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "checkpoints" / str(STEPS))
    assert run_folder.latest_step(moved) == 14
    lines = finish(moved, flags + mesh, 1, devices)
    assert [line["step"] for line in lines] == [line["step"] for line in stayed]
    for ours, theirs in zip(lines, stayed, strict=True):
        for name in {"loss", "nll", "held_out_nll"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), (theirs["step"], name)


def test_processes_evaluate_as_one(tmp_path, alone):
    """Text, scores, answers and needles over the devices of two processes, and over one device of one."""
    sums = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(60)]
    pairs = [{"question": f"After {i}", "choices": [f"comes {i + 1}", f"goes {i}"], "label": i % 2} for i in range(60)]
    for name, examples in (("gsm8k_100", sums), ("piqa", pairs)):
        folder = tmp_path / sets.FOLDER / f"{name}-{sets.SETS[name].version}"
        folder.mkdir(parents=True)
        (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    found = []
    for processes, devices in ((1, 1), (2, 2)):
        run = tmp_path / f"by-{processes}"
        command = ["eval.py", "--checkpoint", str(alone[0]), "--json", f"{run}.json", "--samples", str(run)]
        command += ["--tasks", "offline_piqa,offline_gsm8k_100", "--num-fewshot", "0", "--max-gen-toks", "8"]
        command += ["--limit", "12", "--needle", "--haystack.lengths", "300", "--haystack.repeats", "1"]
        command += ["--capacity.rows", "4", "--haystack.depths", "2"]
        command += ["--mesh.data", "2", "--mesh.expert", "2"] if processes > 1 else []
        with started(run, command, processes, devices) as those:
            codes = [process.wait(timeout=400) for process in those]
        assert codes == [0] * processes, output(run, 0)
        answers = {path.name: path.read_text() for path in sorted(run.iterdir())}
        found.append((json.loads(Path(f"{run}.json").read_text()), answers))
    (one, answers), (two, others) = found
    assert "bits per byte" in output(tmp_path / "by-2", 0) and "bits per byte" not in output(tmp_path / "by-2", 1)
    assert two.pop("bits_per_byte") == pytest.approx(one.pop("bits_per_byte"), rel=1e-5)
    assert two["benchmarks"] == one["benchmarks"] and two["needle"] == one["needle"]
    assert len(answers) == 2 and answers.keys() == others.keys()
    for name, text in answers.items():
        for mine, theirs in zip(*(map(json.loads, t.splitlines()) for t in (text, others[name])), strict=True):
            assert mine["doc"] == theirs["doc"] and _alike(mine["filtered_resps"], theirs["filtered_resps"])


def _alike(mine, theirs):
    """Texts and verdicts the same, log-likelihoods within rounding."""
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(_alike, mine, theirs))
    return mine == theirs or float(mine) == pytest.approx(float(theirs), rel=1e-4)
