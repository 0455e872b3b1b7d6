"""A run that is killed and resumed equals the undisturbed run bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import COMPILE_FAST

from dsv2_jax.training import checkpoint, loop, metrics, run_folder

ROOT = Path(__file__).parents[2]
STEPS, RAMP_STEPS = 36, 14


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A small corpus of made-up sentences, and a tiny run on it of 36 steps, whose batch grows after 14."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["light", "water", "stone", "river", "small", "great", "house", "under", "never", "always", "quiet"]
    for i in range(60):
        sentences = (" ".join(rng.choice(words, 8)).capitalize() + "." for _ in range(20))
        (folder / f"{i}.txt").write_text(" ".join(sentences) + f" Page {i}.\n", encoding="utf-8")
    return [
        "--data.source", str(folder), "--data.folder", str(tmp_path_factory.mktemp("data")),
        "--data.held_out_fraction", "0.1", "--model.vocab_size", "320",
        "--batch.micro_size", "2", "--batch.ramp_from", "2", "--batch.ramp_tokens", str(RAMP_STEPS * 2 * 32),
        "--tokens", str(RAMP_STEPS * 2 * 32 + (STEPS - RAMP_STEPS) * 4 * 32),
        "--cadence.save", "7", "--cadence.evaluate", "12",
    ]  # fmt: skip


def start(run, flags):
    """train.py as a user starts it, on one CPU device."""
    environment = {**os.environ, "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count=1"}
    command = [sys.executable, str(ROOT / "train.py"), "tiny", "--workdir", str(run), *flags]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def stop_at(run, flags, step, number):
    """Trains until `step` is logged, sends the signal, and returns the exit code."""
    path = run / "metrics.jsonl"
    with start(run, flags) as process:
        while process.poll() is None:
            if path.exists() and f'{{"step": {step}, ' in path.read_text():
                process.send_signal(number)
                break
            time.sleep(0.002)
        output = process.communicate()[0]
        assert process.returncode in (-number, loop.STOPPED), output
        return process.returncode


def finish(run, flags):
    """Trains to the end; returns the metrics that do not depend on the clock, and what was printed."""
    with start(run, flags) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    clock = "tokens_per_second", "mfu"
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics.read(run)], output


def test_killed_stopped_and_resumed(tmp_path, flags):
    alone, output = finish(tmp_path / "alone", flags)
    assert f"checkpoint  {tmp_path / 'alone' / 'checkpoints' / str(STEPS)}\n" in output
    assert f"held out    {alone[-1]['held_out_bits_per_byte']:.4f} bits per byte\n" in output

    run = tmp_path / "disturbed"
    assert stop_at(run, flags, 11, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(run, flags, 17, signal.SIGTERM) == loop.STOPPED
    stopped_at = run_folder.latest_step(run)
    assert 17 <= stopped_at < STEPS
    disturbed, output = finish(run, flags)
    assert int(re.search(r"continuing from step (\d+) in", output)[1]) == stopped_at
    assert disturbed == alone
    assert [line["step"] for line in alone if "nll" in line] == list(range(1, STEPS + 1))
    _, ours = checkpoint.restore_params(run)
    _, theirs = checkpoint.restore_params(tmp_path / "alone")
    for part, named in theirs.items():
        for name, value in named.items():
            np.testing.assert_array_equal(ours[part][name], value, err_msg=name)

    again, output = finish(run, flags)
    assert again == alone, "a finished run that is started again must change nothing"
