"""python -m dsv2_jax.serve --checkpoint DIR: serves a model over OpenAI's HTTP interface."""

import asyncio
import dataclasses
import functools
import signal
import sys
from pathlib import Path

from dsv2_jax import cli
from dsv2_jax.config import Compute, Mesh, check
from dsv2_jax.inference.engine import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves completions and chat over HTTP."""

    checkpoint: Path  # a run's folder or a Hugging Face folder
    host: str = "127.0.0.1"  # interface to listen on; 0.0.0.0: all
    port: int = 8000  # 0: a free port, printed on the first line
    name: str = ""  # name of the model in the API; empty: the name of its folder
    api_key_file: Path | None = None  # file with the key that clients must send
    most_requests: int = 256  # maximum number of requests that wait or run; further ones get status 429
    most_connections: int = 512  # maximum number of open connections; further ones get status 503
    body_bytes: int = 1 << 20  # maximum number of bytes of a request's body
    idle_seconds: float = 60.0  # time limit for receiving a request, sending a part of a response, between requests
    drain_seconds: float = 30.0  # time limit for running requests after SIGTERM
    capacity: Capacity = dataclasses.field(default_factory=Capacity)
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def __post_init__(self) -> None:
        check(0 <= self.port < 65536, f"port must be from 0 to 65535, not {self.port}")
        for name in ("most_requests", "most_connections", "body_bytes", "idle_seconds"):
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(self.drain_seconds >= 0, f"drain_seconds must be at least 0, not {self.drain_seconds}")


def main() -> None:
    """The command line."""
    args = cli.parse(Serve, prog=cli.called("python -m dsv2_jax.serve"))
    from dsv2_jax import loading
    from dsv2_jax.inference.engine import Engine
    from dsv2_jax.parallel import mesh, xla
    from dsv2_jax.serve.app import Limits, Server

    xla.choose()
    cli.keep_compiled_programs()
    key = ""
    if args.api_key_file is not None:
        key = args.api_key_file.read_text(encoding="utf-8").strip()
        check(bool(key), f"{args.api_key_file} is empty; it must contain the API key")
    devices = mesh.make(args.mesh)
    loaded = loading.load_for_engine(args.checkpoint, devices, compute=args.compute, weights=args.capacity.weights)
    tokenizer = loaded.need_tokenizer()
    engine = Engine(
        loaded.params, loaded.model, compute=args.compute, capacity=args.capacity, tokenizer=tokenizer, mesh=devices
    )
    print("compiling", file=sys.stderr, flush=True)
    engine.warm()
    name = args.name or args.checkpoint.resolve().name
    limits = Limits(requests=args.most_requests, body_bytes=args.body_bytes, idle_seconds=args.idle_seconds)
    server = Server(engine, tokenizer, name, limits, key=key)
    asyncio.run(serve(server, args))


async def serve(server, args: Serve) -> None:
    """Serves until SIGTERM or SIGINT, then rejects new requests and waits for running ones."""
    from dsv2_jax.serve.connections import listening

    stop = asyncio.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    limits = {"limit": args.most_connections, "idle_seconds": args.idle_seconds}
    async with listening(server.application, args.host, args.port, **limits) as (host, port):
        print(f"serving {server.name} on http://{host}:{port}/v1", flush=True)
        await stop.wait()
        print("stopping: new requests are rejected", file=sys.stderr, flush=True)
        await server.drain(args.drain_seconds)


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
