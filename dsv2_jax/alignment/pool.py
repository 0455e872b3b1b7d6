"""Computes the rewards of many answers in parallel, in worker processes on every host."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

import numpy as np

from dsv2_jax.alignment import verifiers
from dsv2_jax.alignment.verifiers import Item
from dsv2_jax.parallel import processes


class RewardPool:
    """Scores answers by rewards of `verifiers.REWARDS`; a context manager that ends its worker processes on exit.

    Workers are processes, not threads, because a reward may hold the interpreter lock and math-verify's time limit
    needs a main thread. They start on first use, at most one for each CPU of this process.
    """

    def __init__(self, names: Sequence[str], workers: int | None = None) -> None:
        """workers: the maximum number of worker processes; None for the number of CPUs that this process may use."""
        self._names = tuple(names)
        # Not fork: this process runs JAX's threads. Not forkserver: a SIGTERM to the process group would end it.
        self._workers = concurrent.futures.ProcessPoolExecutor(
            workers or len(os.sched_getaffinity(0)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
        )

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)

    def __call__(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Every reward of N answers: {name: float64 [N]}, equal in all processes.

        One process scores each answer, so rewards that depend on time are equal in all processes too. Raises what a
        reward raises, and RuntimeError if the system kills a worker.
        """
        count, own = processes.count(), processes.index()
        rewards_NR = np.zeros((len(items), len(self._names)))
        if self._names:
            with processes.together("rewards"):
                mine = [(self._names, items[i], texts[i]) for i in range(own, len(items), count)]
                found = list(self._workers.map(_scores, mine))
                rewards_NR[own::count] = np.reshape(found, (-1, len(self._names)))
            all_PNR = processes.gathered(rewards_NR)
            answers = np.arange(len(items))
            rewards_NR = all_PNR[answers % count, answers]
        return dict(zip(self._names, rewards_NR.T, strict=True))


def _scores(job: tuple[Sequence[str], Item, str]) -> list[float]:
    names, item, text = job
    return [verifiers.REWARDS[name].reward(item, text) for name in names]


def _begin() -> None:
    """Prepares a worker: it ignores signals, which the parent handles, and ends when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a launcher sends them to the process group
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
