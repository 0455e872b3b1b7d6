"""The processes of one run, one a host: how they meet, what only the first of them does, and how they stop together."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv2_jax.config import Processes

_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
GONE = 1  # exit code when another process is gone


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """While entered, this process is one of the run's. If another one dies, this one ends with a plain message."""
    coordinator = processes.coordinator or ("auto" if _on_a_pod() else "")
    if not coordinator:
        yield
        return
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
    else:
        jax.distributed.initialize(coordinator, processes.count, processes.index, heartbeat_timeout_seconds=_HEARTBEAT)
    if jax.default_backend() == "cpu":
        # Only the first process keeps programs, so it alone would find them. It would come to the first transfer while
        # the others compile, and Gloo waits half a minute for them.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).splitlines()[0]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends, for another one is gone or failed; "
            f"start all of them again, and the run goes on from its newest checkpoint ({first_line})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(GONE)  # an orderly end would wait for those that are gone


def is_first() -> bool:
    """Whether this is the process that writes logs, configs and plots."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """The first process does the body, then the others: what it leaves on a shared disk they find."""
    if not is_first():
        multihost_utils.sync_global_devices(what)
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(answer: bool) -> bool:
    """The first process's answer, in all of them."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def everywhere(tree: Any) -> Any:
    """Arrays that lie over the devices of all processes, as whole arrays of each process's own."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def of_the_first(value: np.ndarray) -> np.ndarray:
    """The first process's numbers, of the same shape in all, in all of them."""
    return value if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(value))


class Stop:
    """While entered, SIGTERM does not end the process: `asked` says to stop, in all processes at the same step."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:  # of several, JAX's coordinator catches the signal
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; to be asked once a step, by all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True


def _on_a_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
