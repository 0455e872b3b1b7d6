"""What Prometheus is told: requests, tokens, waiting times, and how full the engine is."""

import time
from collections.abc import Sequence

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

from dsv2_jax.inference.engine import Engine
from dsv2_jax.inference.request import Event

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server. Gauges of the engine are read when they are asked for."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        kept = self._registry
        self.requests = Counter("dsv2_requests", "Requests by path and HTTP status", ["path", "status"], registry=kept)
        self.disconnects = Counter("dsv2_disconnects", "Clients that left before their answer was whole", registry=kept)
        self.prompt_tokens = Counter("dsv2_prompt_tokens", "Tokens of prompts", registry=kept)
        self.reused_tokens = Counter("dsv2_reused_tokens", "Tokens of prompts found in the cache", registry=kept)
        self.new_tokens = Counter("dsv2_new_tokens", "Tokens generated", registry=kept)
        self.first_token = Histogram(
            "dsv2_first_token_seconds", "From the request to its first token", buckets=_SECONDS, registry=kept
        )
        self.seconds = Histogram(
            "dsv2_request_seconds", "From the request to the end of its answer", buckets=_SECONDS, registry=kept
        )

    def watch(self, engine: Engine) -> None:
        """Adds what can be read of the engine at any time."""

        def gauge(name: str, told: str, read) -> None:
            Gauge(name, told, registry=self._registry).set_function(read)

        gauge("dsv2_running", "Sequences that run", lambda: sum(len(lane.running) for lane in engine.lanes))
        gauge("dsv2_waiting", "Requests that wait for room", lambda: sum(len(lane.waiting) for lane in engine.lanes))
        gauge("dsv2_pages_held", "Cache pages that sequences hold", lambda: sum(x.pages.held for x in engine.lanes))
        gauge("dsv2_pages", "Cache pages in all", lambda: sum(x.pages.count - 1 for x in engine.lanes))
        gauge(
            "dsv2_preemptions", "Sequences put back for want of pages", lambda: sum(x.preemptions for x in engine.lanes)
        )

    def observe(self, events: Sequence[Event]) -> None:
        """Counts a step's events."""
        self.new_tokens.inc(sum(event.token is not None for event in events))
        self.reused_tokens.inc(sum(event.result.reused for event in events if event.result))

    def text(self) -> bytes:
        """The figures in Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)


def now() -> float:
    """Seconds, for differences."""
    return time.perf_counter()
