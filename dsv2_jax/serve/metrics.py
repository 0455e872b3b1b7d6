"""Prometheus metrics: requests, tokens, latencies, and the load of the engine."""

import time
from collections.abc import Sequence

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

from dsv2_jax.inference.engine import Engine
from dsv2_jax.inference.request import RequestEvent

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one server. Gauges read the engine when they are scraped."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        kept = self._registry
        self.requests = Counter("dsv2_requests", "Requests by path and HTTP status", ["path", "status"], registry=kept)
        self.disconnects = Counter(
            "dsv2_disconnects", "Clients that disconnected before the end of their response", registry=kept
        )
        self.prompt_tokens = Counter("dsv2_prompt_tokens", "Prompt tokens", registry=kept)
        self.reused_tokens = Counter("dsv2_reused_tokens", "Prompt tokens found in the cache", registry=kept)
        self.new_tokens = Counter("dsv2_new_tokens", "Generated tokens", registry=kept)
        self.first_token = Histogram(
            "dsv2_first_token_seconds", "Seconds from a request to its first token", buckets=_SECONDS, registry=kept
        )
        self.seconds = Histogram(
            "dsv2_request_seconds", "Seconds from a request to the end of its response", buckets=_SECONDS, registry=kept
        )

    def watch(self, engine: Engine) -> None:
        """Adds gauges that read the engine."""

        def gauge(name: str, description: str, read) -> None:
            Gauge(name, description, registry=self._registry).set_function(read)

        gauge("dsv2_running", "Running sequences", lambda: sum(len(x.running) for x in engine.replicas))
        gauge("dsv2_waiting", "Queued requests", lambda: sum(len(x.waiting) for x in engine.replicas))
        gauge("dsv2_pages_held", "Cache pages that sequences hold", lambda: sum(x.pages.held for x in engine.replicas))
        gauge("dsv2_pages", "Cache pages in total", lambda: sum(x.pages.count - 1 for x in engine.replicas))
        gauge("dsv2_preemptions", "Preemptions for lack of pages", lambda: sum(x.preemptions for x in engine.replicas))

    def observe(self, events: Sequence[RequestEvent]) -> None:
        """Counts a step's events."""
        self.new_tokens.inc(sum(event.token is not None for event in events))
        self.reused_tokens.inc(sum(event.result.reused for event in events if event.result))

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)


def now() -> float:
    """Seconds of a monotonic clock."""
    return time.perf_counter()
