"""The pool of rewards: verdicts in the order of the answers, several at once, no worker outlives the run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv2_jax.alignment import verifiers
from dsv2_jax.alignment.pool import RewardPool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool():
    with RewardPool(["maths", "brevity"], workers=2) as made:
        yield made


def test_verdicts_are_those_of_each_answer_alone_in_float64(pool):
    items = [{"answer": f"${n % 5}$", "most_characters": 7} for n in range(20)]
    texts = [rf"\boxed{{{n % 3}}}" + "." * n for n in range(20)]
    found = pool(items, texts)
    assert list(found) == ["maths", "brevity"]
    for name, verdicts in found.items():
        assert verdicts.dtype == np.float64
        assert verdicts.tolist() == [verifiers.REWARDS[name].reward(i, t) for i, t in zip(items, texts, strict=True)]
    assert {1.0, 0.0, 2 - 9 / 7} < {*found["maths"], *found["brevity"]}  # sevenths are no float32


def test_what_a_reward_raises_is_raised(pool):
    with pytest.raises(KeyError, match="answer"):
        pool([{"most_characters": 7}], ["7"])


class Meeting(dict):
    """An item that is read when as many of its kind are being read, each by a process of its own."""

    def __getitem__(self, key):
        folder = Path(super().__getitem__("folder"))
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(folder.iterdir())) < super().__getitem__("together"):
            if time.monotonic() > end:
                raise TimeoutError("nobody else came")
            time.sleep(0.01)
        return super().__getitem__(key)


def test_answers_are_scored_several_at_a_time(pool, tmp_path):
    items = [Meeting(answer="$7$", most_characters=10, folder=str(tmp_path), together=2) for _ in range(4)]
    found = pool(items, ["7" + "x" * n for n in (9, 14, 19, 0)])
    assert found["brevity"].tolist() == [1, 0.5, 0, 1]


@pytest.mark.slow
def test_workers_leave_signals_to_the_run_and_end_with_it():
    script = """
import multiprocessing, signal
from dsv2_jax.alignment.pool import RewardPool
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    pool = RewardPool(["brevity"], workers=2)
    for _ in range(2):
        print(pool([{"most_characters": 1}] * 9, ["a"] * 9)["brevity"].sum(), flush=True)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as run:
        assert run.stdout is not None
        for _ in range(2):
            assert run.stdout.readline() == "9.0\n"
            workers = [int(pid) for pid in run.stdout.readline().split()]
            os.killpg(run.pid, signal.SIGTERM)
        run.kill()
    assert workers
    end = time.monotonic() + 10
    while alive(workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(workers)


def alive(workers):
    found = []
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            found.append(pid)
    return found
