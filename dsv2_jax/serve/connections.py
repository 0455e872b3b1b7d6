"""The listening socket: how many connections there may be, and how long one may keep the server waiting."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

_FULL = b'{"error": {"message": "too many connections are open", "type": "server_error", "param": null, "code": 503}}'


class _Door(asyncio.Protocol):
    """Hands a new connection to the HTTP server; one too many is answered here, without reading from it."""

    def __init__(self, served: web.Server, most: int) -> None:
        self._served, self._most = served, most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._served.connections) < self._most:
            protocol = self._served()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
            return
        head = "HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(_FULL)}"
        transport.write("\r\n".join((*head, "Retry-After: 1", "Connection: close", "", "")).encode() + _FULL)
        transport.close()


@contextlib.asynccontextmanager
async def listening(
    application: web.Application, host: str, port: int, *, most: int, idle_seconds: float
) -> AsyncIterator[tuple[str, int]]:
    """Serves while entered; gives the address.

    most: connections that may be open; more are answered with 503 and closed. idle_seconds: after so long without a
    request, since it was opened or since its last answer, a connection is closed, also while it sends headers bit by
    bit.
    """
    # A handler whose client has left is cancelled, and with it the request's sequences.
    runner = web.AppRunner(
        application,
        handler_cancellation=True,
        shutdown_timeout=1.0,
        keepalive_timeout=idle_seconds,
        lingering_time=min(idle_seconds, 2.0),  # after an answer, for the rest of a body that was not read
    )
    await runner.setup()
    served = runner.server
    assert served is not None
    listener = await asyncio.get_running_loop().create_server(lambda: _Door(served, most), host, port)
    try:
        yield listener.sockets[0].getsockname()[:2]
    finally:
        listener.close()
        await runner.cleanup()
