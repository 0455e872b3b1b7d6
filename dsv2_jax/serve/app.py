"""The HTTP application: routes, API key, limits, streaming and error responses."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference.engine import Engine
from dsv2_jax.inference.request import Result
from dsv2_jax.serve import protocol
from dsv2_jax.serve.metrics import Metrics, now
from dsv2_jax.serve.protocol import ApiCall
from dsv2_jax.serve.worker import Busy, Stream, Worker

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_READERS = 4  # threads that tokenize; the tokenizer releases the GIL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on clients."""

    requests: int = 256  # maximum number of requests that wait, run or are being tokenized
    body_bytes: int = 1 << 20  # maximum number of bytes of a request's body
    idle_seconds: float = 60.0  # time limit for receiving a body, and for sending a part of a stream


class Server:
    """Serves one engine over HTTP. `application` is the aiohttp application."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits, *, key: str = ""):
        self.engine, self.tokenizer, self.name, self.key = engine, tokenizer, name, key
        self.metrics = Metrics()
        self.metrics.watch(engine)
        self.draining = False
        self._limits = limits
        self._reading = 0  # calls whose text is being tokenized
        self.application = web.Application(client_max_size=limits.body_bytes, middlewares=[self._guard])
        self.application.cleanup_ctx.append(self._working)
        self.application.add_routes(
            [
                web.post("/v1/completions", functools.partial(self._answer, "completion")),
                web.post("/v1/chat/completions", functools.partial(self._answer, "chat")),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
            ]
        )

    async def drain(self, seconds: float) -> None:
        """Rejects new requests, and waits up to `seconds` for running ones."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.worker.open:
                    await asyncio.sleep(0.02)

    async def _working(self, _: web.Application) -> AsyncIterator[None]:
        self.worker = Worker(self.engine, self._limits.requests, self.metrics.observe)
        self._readers = concurrent.futures.ThreadPoolExecutor(_READERS, "reader")
        yield
        self._readers.shutdown(wait=False, cancel_futures=True)
        await self.worker.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks the API key, and converts exceptions to OpenAI's error responses."""
        try:
            if self.key and request.path != "/health":
                given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), self.key.encode()):
                    return self._count(request, _error(401, "a valid API key is required: Authorization: Bearer KEY"))
            return self._count(request, await handler(request))
        except (asyncio.CancelledError, ConnectionError):  # the client disconnected
            self.metrics.disconnects.inc()
            raise
        except (ValueError, FileNotFoundError) as error:
            status = 404 if isinstance(error, FileNotFoundError) else 400
            return self._count(request, _error(status, str(error)))
        except Busy as error:
            return self._count(request, _error(503 if self.draining else 429, str(error), {"Retry-After": "1"}))
        except web.HTTPException as error:
            messages = {404: f"unknown path {request.path}", 413: "the body is too large"}
            messages[408] = f"the body did not arrive within {self._limits.idle_seconds:g} seconds"
            return self._count(request, _error(error.status, messages.get(error.status, error.reason)))
        except RuntimeError as error:
            return self._count(request, _error(500, str(error)))

    def _count(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        known = request.match_info.route.resource
        path = known.canonical if known else "other"
        self.metrics.requests.labels(path, response.status).inc()
        return response

    async def _answer(self, kind: protocol.Kind, request: web.Request) -> web.StreamResponse:
        begin = now()
        if self.draining:
            raise Busy("the server is stopping")
        call = await self._call(kind, request)
        streams = self.worker.submit(call.requests)
        self.metrics.prompt_tokens.inc(sum(len(r.prompt) for r in call.requests[:: call.n]))
        try:
            if call.stream:
                return await self._stream(call, streams, request, begin)
            results = await asyncio.gather(*(self._collect(stream, begin) for stream in streams))
            answer = await asyncio.to_thread(protocol.answer, call, results, self.tokenizer)
            return web.json_response(answer, dumps=_dumps)
        finally:
            for stream in streams:
                stream.cancel()
            self.metrics.seconds.observe(now() - begin)

    async def _call(self, kind: protocol.Kind, request: web.Request) -> ApiCall:
        """Parses the body in a thread, because tokenizing a long text takes seconds and would block the event loop."""
        try:
            async with asyncio.timeout(self._limits.idle_seconds):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        count = self.worker.open + self._reading
        if count >= self._limits.requests:
            raise Busy(f"{count} requests wait or run; the limit is {self._limits.requests}")
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._parse, kind, body)
        finally:
            self._reading -= 1

    def _parse(self, kind: protocol.Kind, body: bytes) -> ApiCall:
        try:
            value = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise ValueError("the body is not JSON") from None
        return protocol.parse(kind, value, self.name, self.tokenizer, self.engine.capacity.length)

    async def _collect(self, stream: Stream, begin: float) -> Result:
        result, first = None, True
        async for event in stream:
            if first:
                self.metrics.first_token.observe(now() - begin)
            result, first = event.result, False
        assert result is not None
        return result

    async def _stream(
        self, call: ApiCall, streams: list[Stream], request: web.Request, begin: float
    ) -> web.StreamResponse:
        """Sends server-sent events, one JSON line each. Events of the sequences of one call interleave."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)

        async def send(value: Any) -> None:
            text = value if isinstance(value, str) else _dumps(value)
            try:
                async with asyncio.timeout(self._limits.idle_seconds):
                    await response.write(f"data: {text}\n\n".encode())
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()  # close() would wait for the client to read
                raise ConnectionResetError("the client does not read its stream") from None

        async def forward(index: int, stream: Stream) -> Result:
            result, first = None, True
            async for event in stream:
                if first:
                    self.metrics.first_token.observe(now() - begin)
                if event.text or event.reason or first or call.logprobs:
                    make = functools.partial(protocol.chunk, call, index, event, self.tokenizer, first)
                    await send(await asyncio.to_thread(make) if call.echo and first else make())
                result, first = event.result, False
            assert result is not None
            return result

        try:
            results = await asyncio.gather(*(forward(i, stream) for i, stream in enumerate(streams)))
        except RuntimeError as error:  # the status is already sent, so the error goes into the stream
            await send({"error": {"message": str(error), "type": "server_error", "param": None, "code": 500}})
        else:
            if call.usage:
                await send(protocol.last_chunk(call, results))
            await send("[DONE]")
        await response.write_eof()
        return response

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "dsv2_jax"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, _: web.Request) -> web.Response:
        state = "failed" if self.worker.failure else "draining" if self.draining else "ok"
        return web.json_response({"status": state}, status=200 if state == "ok" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status, headers=headers)
