"""The processes of one run, one a host: how they meet, what only the first of them does, and how they stop together."""

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dsv2_jax import cli
from dsv2_jax.config import Processes

_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
_MEETING = 24 * 3600  # seconds that processes wait for each other in `together`; one that dies ends them much earlier
_LISTENING = 5  # seconds of one request while a process waits, after which Ctrl-C is noticed
_MISTAKE, _FAILURE, _DONE = "mistake", "failure", "done"
_meetings = itertools.count()  # all processes meet in the same order
GONE = 1  # exit code when another process is gone


class FailedElsewhere(Exception):
    """Another process failed, and has told why."""


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
    except FailedElsewhere as error:
        _say_the_end(str(error))
        sys.exit(GONE)
    except jax.errors.JaxRuntimeError as error:
        _say_the_end(str(error).splitlines()[0])
        os._exit(GONE)  # an orderly end would wait for those that are gone


def _say_the_end(why: str) -> None:
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends, for another one is gone or failed; "
        f"start all of them again, and the run goes on from its newest checkpoint ({why})",
        file=sys.stderr,
        flush=True,
    )


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes logs, configs and plots."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """`together`, but the first process does the body before the others: what it leaves on a shared disk they find."""
    with together(what, first_alone=True):
        yield


@contextlib.contextmanager
def together(what: str, *, first_alone: bool = False) -> Iterator[None]:
    """Every process does the body, for as long as it takes, and all go on when the last one is done.

    They wait at the coordination service, up to 24 hours: a collective on CPU gives up after 30 seconds. If the body
    fails in one process, it ends in all: with ValueError where it was a user's mistake, else FailedElsewhere.
    """
    own = index()
    if count() == 1:
        yield
        return
    number = next(_meetings)
    meeting = f"meetings/{number}"
    try:
        if first_alone and own:
            _hear(f"{meeting}/0")
        yield
        _tell(f"{meeting}/{own}", _DONE)
        if own:
            _hear(f"{meeting}/all")
        else:
            for other in range(1, count()):
                _hear(f"{meeting}/{other}")
            _tell(f"{meeting}/all", _DONE)
            _service().key_value_delete(f"meetings/{number - 1}")  # all have left it
    except (_MistakeElsewhere, FailedElsewhere, jax.errors.JaxRuntimeError):
        raise  # all know it, or nobody can be told
    except BaseException as error:
        mistake = cli.mistake(error)
        why = f"process {own}, {what}: {mistake or f'{type(error).__name__}: {error}'}"
        for name in (str(own), "all"):
            _tell(f"{meeting}/{name}", f"{_MISTAKE if mistake else _FAILURE} {why}")
        raise


class _MistakeElsewhere(ValueError):
    pass


def _service() -> Any:
    """The client of the coordination service: nothing public gives it."""
    return distributed.global_state.client


def _tell(key: str, outcome: str) -> None:
    _service().key_value_set(key, outcome, allow_overwrite=True)


def _hear(key: str) -> None:
    """Waits until somebody tells the outcome of this name, and raises what is no `_DONE`."""
    end = time.monotonic() + _MEETING
    while True:
        try:
            outcome = _service().blocking_key_value_get(key, _LISTENING * 1000)
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > end:
                raise
    kind, _, why = outcome.partition(" ")
    if kind == _MISTAKE:
        raise _MistakeElsewhere(why)
    if kind == _FAILURE:
        raise FailedElsewhere(why)


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


def gathered(value: np.ndarray) -> np.ndarray:
    """Every process's numbers, of the same shape and dtype in all: [P, ...], bit for bit."""
    if jax.process_count() == 1:
        return value[None]
    # As bytes: JAX would make float32 of float64.
    parts = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.asarray(parts).view(value.dtype).reshape(-1, *value.shape)


class Stop:
    """While entered, SIGTERM does not end the process: `asked` says to stop, in all processes at the same call."""

    def __init__(self) -> None:
        self._asked = False
        self._calls = itertools.count()

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:  # of several, JAX's coordinator catches the signal
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether to stop now; all processes call it equally often.

        JAX stops several processes at the call whose number is one above the largest that any of them has reached: so
        calls are counted here, for the steps of a run may rise by more than one between them.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True


def _on_a_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
