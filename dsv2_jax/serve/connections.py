"""The listening socket: limits on the number of connections and on their idle time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

_FULL = b'{"error": {"message": "too many connections are open", "type": "server_error", "param": null, "code": 503}}'


class _Admission(asyncio.Protocol):
    """Passes a new connection to the HTTP server, or answers 503 without reading from it if too many are open."""

    def __init__(self, served: web.Server, limit: int) -> None:
        self._served, self._limit = served, limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._served.connections) < self._limit:
            protocol = self._served()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
            return
        head = "HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(_FULL)}"
        transport.write("\r\n".join((*head, "Retry-After: 1", "Connection: close", "", "")).encode() + _FULL)
        transport.close()


@contextlib.asynccontextmanager
async def listening(
    application: web.Application, host: str, port: int, *, limit: int, idle_seconds: float
) -> AsyncIterator[tuple[str, int]]:
    """Serves while the context is open; yields (host, port).

    limit: the maximum number of open connections; further ones get 503 and are closed. idle_seconds: a connection is
    closed after this time without a complete request, counted from its opening or its last response.
    """
    # Cancels a handler, and so the sequences of its request, when the client disconnects.
    runner = web.AppRunner(
        application,
        handler_cancellation=True,
        shutdown_timeout=1.0,
        keepalive_timeout=idle_seconds,
        lingering_time=min(idle_seconds, 2.0),  # after a response, to drain a body that was not read
    )
    await runner.setup()
    served = runner.server
    assert served is not None
    listener = await asyncio.get_running_loop().create_server(lambda: _Admission(served, limit), host, port)
    try:
        yield listener.sockets[0].getsockname()[:2]
    finally:
        listener.close()
        await runner.cleanup()
