"""The processes of one run, one on each host: how they join, synchronise and stop together."""

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

_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as lost
_MEETING = 24 * 3600  # seconds that processes wait for each other in `together`; a lost process ends the wait earlier
_LISTENING = 5  # timeout in seconds of one request while a process waits; Ctrl-C takes effect between requests
_MISTAKE, _FAILURE, _DONE = "mistake", "failure", "done"
_meetings = itertools.count()  # the same in all processes, which synchronise in the same order
GONE = 1  # the exit code when another process is lost


class FailedElsewhere(Exception):
    """Another process failed and reported why."""


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Joins the processes of the run. If another process is lost, this one exits with a plain message."""
    coordinator = processes.coordinator or ("auto" if _on_a_pod() else "")
    if not coordinator:
        yield
        return
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
    else:
        jax.distributed.initialize(coordinator, processes.count, processes.index, heartbeat_timeout_seconds=_HEARTBEAT)
    if jax.default_backend() == "cpu":
        # Only the first process writes to the cache, so it alone would find programs there. It would reach the first
        # collective while the others compile, and Gloo waits for only half a minute.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    except FailedElsewhere as error:
        _print_end(str(error))
        sys.exit(GONE)
    except jax.errors.JaxRuntimeError as error:
        _print_end(str(error).splitlines()[0])
        os._exit(GONE)  # an orderly exit would wait for the lost processes


def _print_end(why: str) -> None:
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} exits because another process is gone or "
        f"failed; restart all processes to resume the run from its newest checkpoint ({why})",
        file=sys.stderr,
        flush=True,
    )


def count() -> int:
    """The number of processes of the run."""
    return jax.process_count()


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes logs, configs and plots."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """As `together`, but the first process runs the body before the others, which find its files on a shared disk."""
    with together(what, first_alone=True):
        yield


@contextlib.contextmanager
def together(what: str, *, first_alone: bool = False) -> Iterator[None]:
    """Every process runs the body, and all continue when the last one is done.

    They wait at the coordination service for up to 24 hours, because a collective on CPU times out after 30 seconds. If
    the body fails in one process, all processes raise: ValueError for a user's mistake, else FailedElsewhere.
    """
    own = index()
    if count() == 1:
        yield
        return
    number = next(_meetings)
    meeting = f"meetings/{number}"
    try:
        if first_alone and own:
            _wait_for(f"{meeting}/0")
        yield
        _report(f"{meeting}/{own}", _DONE)
        if own:
            _wait_for(f"{meeting}/all")
        else:
            for other in range(1, count()):
                _wait_for(f"{meeting}/{other}")
            _report(f"{meeting}/all", _DONE)
            _service().key_value_delete(f"meetings/{number - 1}")  # all processes have left it
    except (_MistakeElsewhere, FailedElsewhere, jax.errors.JaxRuntimeError):
        raise  # all processes know of the error, or none can be reached
    except BaseException as error:
        mistake = cli.mistake(error)
        why = f"process {own}, {what}: {mistake or f'{type(error).__name__}: {error}'}"
        for name in (str(own), "all"):
            _report(f"{meeting}/{name}", f"{_MISTAKE if mistake else _FAILURE} {why}")
        raise


class _MistakeElsewhere(ValueError):
    pass


def _service() -> Any:
    """The client of the coordination service, which JAX does not export."""
    return distributed.global_state.client


def _report(key: str, outcome: str) -> None:
    _service().key_value_set(key, outcome, allow_overwrite=True)


def _wait_for(key: str) -> None:
    """Waits for the outcome under this key; raises unless it is `_DONE`."""
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
    """The first process's answer, in all processes."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def everywhere(tree: Any) -> Any:
    """Arrays that are sharded over the devices of all processes, gathered to numpy arrays in each process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def gathered(value: np.ndarray) -> np.ndarray:
    """The values of all processes, [P, ...], bit for bit; shape and dtype must be the same in all."""
    if jax.process_count() == 1:
        return value[None]
    # As bytes, because JAX would convert float64 to float32.
    parts = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.asarray(parts).view(value.dtype).reshape(-1, *value.shape)


class Stop:
    """Catches SIGTERM inside its `with` block. After it, `asked` returns True, in all processes at the same call."""

    def __init__(self) -> None:
        self._asked = False
        self._calls = itertools.count()

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:  # with several, JAX's coordination service catches the signal
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether to stop now. All processes must call it equally often.

        JAX stops several processes at the call whose number is one above the highest that any process has reached. This
        class counts the calls itself, because the step number may rise by more than one between them.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True


def _on_a_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
