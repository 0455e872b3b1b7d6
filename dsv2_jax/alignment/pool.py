"""Rewards of many answers at once: a pool of worker processes on every host, each host with a share of the answers."""

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
    """Scores answers by rewards of `verifiers.REWARDS`; a context manager that ends its workers.

    Workers are processes, not threads: a reward may hold the interpreter lock, and math-verify's time limit needs a
    main thread. They start when they are first needed, one for each CPU of this process at most.
    """

    def __init__(self, names: Sequence[str], workers: int | None = None) -> None:
        """workers: at most so many; None: as many as this process may use CPUs."""
        self._names = tuple(names)
        # Not forked: this process has JAX's threads. And no fork server: a SIGTERM to the group would end it.
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
        """Each reward of each answer, float64 [N] by name, the same in every process.

        Every answer is scored once, by one process, so a verdict that depends on time is the same in all. Raises what
        a reward raises, and RuntimeError if the system kills a worker.
        """
        count, own = processes.count(), processes.index()
        verdicts_NR = np.zeros((len(items), len(self._names)))
        if self._names:
            with processes.together("rewards"):
                mine = [(self._names, items[i], texts[i]) for i in range(own, len(items), count)]
                found = list(self._workers.map(_scores, mine))
                verdicts_NR[own::count] = np.reshape(found, (-1, len(self._names)))
            of_each_PNR = processes.gathered(verdicts_NR)
            answers = np.arange(len(items))
            verdicts_NR = of_each_PNR[answers % count, answers]
        return dict(zip(self._names, verdicts_NR.T, strict=True))


def _scores(asked: tuple[Sequence[str], Item, str]) -> list[float]:
    names, item, text = asked
    return [verifiers.REWARDS[name](item, text) for name in names]


def _begin() -> None:
    """What a worker does first: it leaves signals to the process that started it, and ends when that one is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a launcher may send them to the whole group
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
