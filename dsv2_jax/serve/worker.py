"""The engine's own thread, and how requests of the event loop reach it and its events come back."""

import asyncio
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from dsv2_jax.inference.engine import Engine
from dsv2_jax.inference.request import Event, Request


class Busy(Exception):
    """No more requests are taken: the queue is full, or the server is stopping."""


class Stream:
    """The events of one request, to be read in the event loop."""

    def __init__(self, worker: "Worker", request: Request):
        self.request = request
        self.id: int | None = None  # the engine's; written by its thread alone
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.ended = False  # nothing more is to be read
        self._worker = worker

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events. Raises RuntimeError when the engine has failed, and for probabilities that are no numbers."""
        while not self.ended:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if not _finite(event):
                raise RuntimeError("the model computes NaN or infinity for this request: its weights are damaged")
            self.ended = event.result is not None
            yield event

    def cancel(self) -> None:
        """The engine drops the request, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.events.put_nowait(RuntimeError("the request was cancelled"))  # wakes who waits for the next event
            self._worker.drop(self)


def _finite(event: Event) -> bool:
    scores = event.result.scores if event.result is not None else ()
    told = [event.logprob if event.token is not None else 0.0, *(p for _, p in event.top), *(p for p, _ in scores)]
    return all(map(math.isfinite, told))


class Worker:
    """Runs an engine. All methods but the thread's own are called from the event loop."""

    def __init__(self, engine: Engine, most: int, observe: Callable[[Sequence[Event]], None]):
        """most: requests that wait or run. observe: told every step's events, in the event loop."""
        self.engine, self.most = engine, most
        self.failure: Exception | None = None
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # of the thread
        self._open: set[Stream] = set()  # of the event loop: those whose request has not ended
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Requests that wait or run."""
        return len(self._open)

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Queues requests, all or none. Raises ValueError for one that cannot be served, Busy if there is no room."""
        for request in requests:
            self.engine.check(request)
        if self.failure is not None:
            raise Busy("the engine has failed; the server must be restarted")
        if self.open + len(requests) > self.most:
            raise Busy(f"{self.open} requests wait or run, and at most {self.most} may")
        streams = [Stream(self, request) for request in requests]
        self._open.update(streams)
        for stream in streams:
            self._commands.put(lambda stream=stream: self._add(stream))
        return streams

    def drop(self, stream: Stream) -> None:
        """Called once by a stream that ends before its request does."""
        self._open.discard(stream)
        self._commands.put(lambda: self._cancel(stream))

    async def close(self) -> None:
        """Ends the thread; what still runs is dropped."""
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
            while self._obey():
                told = [(self._streams[event.id], event) for event in self.engine.step()]
                for _, event in told:
                    if event.result is not None:
                        del self._streams[event.id]
                if told:
                    self._loop.call_soon_threadsafe(self._tell, told)
            for id in self._streams:
                self.engine.cancel(id)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, error)
            raise

    def _obey(self) -> bool:
        """Carries out what the event loop asked for, waiting for it when there is nothing to do; False: to end."""
        while not self._commands.empty() or not self.engine.unfinished:
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _tell(self, told: Sequence[tuple[Stream, Event]]) -> None:
        self._observe([event for _, event in told])
        for stream, event in told:
            if event.result is not None:
                self._open.discard(stream)
            stream.events.put_nowait(event)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        for stream in self._open:
            stream.events.put_nowait(RuntimeError("the engine has failed"))
