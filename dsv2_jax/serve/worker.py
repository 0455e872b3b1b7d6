"""The engine's thread, which takes requests from the event loop and returns events to it."""

import asyncio
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from dsv2_jax.inference.engine import Engine
from dsv2_jax.inference.request import Request, RequestEvent


class Busy(Exception):
    """The server accepts no more requests: the queue is full, the engine failed, or the server is stopping."""


class Stream:
    """The events of one request, read in the event loop."""

    def __init__(self, worker: "Worker", request: Request):
        self.request = request
        self.id: int | None = None  # the engine's id; only its thread writes this
        self.events: asyncio.Queue[RequestEvent | Exception] = asyncio.Queue()
        self.ended = False  # no more events to read
        self._worker = worker

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        """Iterates over the events. Raises RuntimeError if the engine failed or a log-probability is not finite."""
        while not self.ended:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if not _finite(event):
                raise RuntimeError("the model computed NaN or infinity for this request; its weights may be damaged")
            self.ended = event.result is not None
            yield event

    def cancel(self) -> None:
        """Cancels the request in the engine, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.events.put_nowait(RuntimeError("the request was cancelled"))  # wakes the reader of the next event
            self._worker.drop(self)


def _finite(event: RequestEvent) -> bool:
    scores = event.result.scores if event.result is not None else ()
    logprobs = [event.logprob if event.token is not None else 0.0, *(p for _, p in event.top), *(p for p, _ in scores)]
    return all(map(math.isfinite, logprobs))


class Worker:
    """Runs an engine in a thread. The public methods are called from the event loop."""

    def __init__(self, engine: Engine, limit: int, observe: Callable[[Sequence[RequestEvent]], None]):
        """limit: the maximum number of requests that wait or run.

        observe: called in the event loop with the events of every step.
        """
        self.engine, self.limit = engine, limit
        self.failure: Exception | None = None
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # used by the thread alone
        self._open: set[Stream] = set()  # used by the event loop alone: streams whose request has not ended
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Number of requests that wait or run."""
        return len(self._open)

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Queues all requests or none. Raises ValueError for one that cannot be served, Busy if the queue is full."""
        for request in requests:
            self.engine.check(request)
        if self.failure is not None:
            raise Busy("the engine has failed; the server must be restarted")
        if self.open + len(requests) > self.limit:
            raise Busy(f"{self.open} requests wait or run; the limit is {self.limit}")
        streams = [Stream(self, request) for request in requests]
        self._open.update(streams)
        for stream in streams:
            self._commands.put(lambda stream=stream: self._add(stream))
        return streams

    def drop(self, stream: Stream) -> None:
        """Cancels the request of a stream. Called once, by a stream that ends before its request."""
        self._open.discard(stream)
        self._commands.put(lambda: self._cancel(stream))

    async def close(self) -> None:
        """Ends the thread and cancels all requests."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _add(self, stream: Stream) -> None:
        stream.id = self.engine.add(stream.request)
        self._streams[stream.id] = stream

    def _cancel(self, stream: Stream) -> None:
        if stream.id is not None and self._streams.pop(stream.id, None):
            self.engine.cancel(stream.id)

    def _run(self) -> None:
        try:
            while self._run_commands():
                events = [(self._streams[event.id], event) for event in self.engine.step()]
                for _, event in events:
                    if event.result is not None:
                        del self._streams[event.id]
                if events:
                    self._loop.call_soon_threadsafe(self._deliver, events)
            for id in self._streams:
                self.engine.cancel(id)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, error)
            raise

    def _run_commands(self) -> bool:
        """Runs queued commands, and waits for one while the engine is idle. Returns False when the thread must end."""
        while not self._commands.empty() or not self.engine.unfinished:
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self, events: Sequence[tuple[Stream, RequestEvent]]) -> None:
        self._observe([event for _, event in events])
        for stream, event in events:
            if event.result is not None:
                self._open.discard(stream)
            stream.events.put_nowait(event)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for stream in self._open:
            stream.events.put_nowait(RuntimeError("the engine has failed"))
