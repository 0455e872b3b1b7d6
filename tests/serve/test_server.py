"""The server with OpenAI's own client: answers, streams, refused requests, many clients of whom a third disconnects."""

import asyncio
import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import jax
import openai
import pytest
from tiny import give_tokenizer, make_run, random_params

from configs import models
from dsv2_jax.config import Compute
from dsv2_jax.data import tokenizer
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.serve.app import Limits, Server
from dsv2_jax.serve.connections import listening

ROOT = Path(__file__).parent.parent.parent
MODEL = dataclasses.replace(models.tiny(), vocab_size=512)
CAPACITY = Capacity(rows=4, length=256, chunk=64, page=16)


@contextlib.contextmanager
def running(engine: Engine, words, *, key: str = "", limit: int = 300, **limits):
    """(the server, its address), in a thread with an event loop of its own. limit: connections."""
    limits = {"requests": 300, "body_bytes": 20_000, "idle_seconds": 60.0} | limits
    server = Server(engine, words, "tiny", Limits(**limits), key=key)
    loop, started, address = asyncio.new_event_loop(), threading.Event(), []
    stop = asyncio.Event()

    async def serve() -> None:
        where = listening(server.application, "127.0.0.1", 0, limit=limit, idle_seconds=limits["idle_seconds"])
        async with where as (host, port):
            address.append(f"http://{host}:{port}")
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield server, address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    give_tokenizer(folder)
    return tokenizer.load(folder / "tokenizer")


@pytest.fixture(scope="module")
def engine(words):
    params = jax.tree.map(jax.numpy.asarray, random_params(MODEL))
    compute = Compute(dtype="float32", remat="none")
    engine = Engine(params, MODEL, compute=compute, capacity=CAPACITY, tokenizer=words)
    engine.warm()
    return engine


@pytest.fixture(scope="module")
def served(engine, words):
    with running(engine, words) as (server, address):
        yield server, address


@pytest.fixture(scope="module")
def expected(words):
    """Greedy answers of an engine of its own, by prompt."""
    other = Engine(
        jax.tree.map(jax.numpy.asarray, random_params(MODEL)),
        MODEL,
        compute=Compute(dtype="float32", remat="none"),
        capacity=CAPACITY,
        tokenizer=words,
    )

    def answer(prompt: str, new: int):
        ids = (words.bos_id, *words.encode(prompt))
        return other.generate([Request(prompt=ids, max_new=new, stop_ids=(words.eos_id,), text=True)])[0]

    answer.engine = other
    return answer


def client(served, **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=served[1] + "/v1", **{"api_key": "none", "max_retries": 0} | settings)


def test_completions_and_their_stream(served, expected):
    wanted = expected("import os", 20)
    plain = client(served).completions.create(model="tiny", prompt="import os", max_tokens=20, temperature=0)
    assert plain.choices[0].text == wanted.text
    assert plain.choices[0].finish_reason == wanted.reason
    assert plain.usage and plain.usage.completion_tokens == len(wanted.tokens)
    options: dict = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(
        client(served).completions.create(model="tiny", prompt="import os", max_tokens=20, temperature=0, **options)
    )
    assert "".join(p.choices[0].text for p in parts if p.choices) == wanted.text
    assert parts[-1].usage and parts[-1].usage.completion_tokens == len(wanted.tokens)


def test_chat_and_its_stream(served, expected, words):
    messages: list = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    wanted = expected("be brief\n\nUser: hello\n\nAssistant:", 12)
    settings: dict = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    plain = client(served).chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert plain.choices[0].message.content == wanted.text
    told = plain.choices[0].logprobs.content
    assert [t.logprob for t in told] == pytest.approx(wanted.logprobs, abs=1e-4)
    assert [t.token for t in told] == [words.decode([token]) for token in wanted.tokens]
    assert all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 2 for t in told)
    parts = list(client(served).chat.completions.create(**settings, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == wanted.text


def test_echo_scores_the_prompt(served, expected, words):
    prompt = "def main(argument):"
    found = client(served).completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    ids = [words.bos_id, *words.encode(prompt)]
    told = found.choices[0].logprobs
    assert found.choices[0].text == prompt == "".join(told.tokens)
    assert len(told.token_logprobs) == len(ids) - 1
    scored = expected.engine.score([ids])[0].scores
    assert told.token_logprobs == pytest.approx([p for p, _ in scored], abs=1e-4)


def test_stop_strings_seeds_and_n(served, expected):
    whole = expected("import os", 20).text
    stop = whole[4:7]
    settings: dict = {"model": "tiny", "prompt": "import os", "max_tokens": 20}
    cut = client(served).completions.create(**settings, temperature=0, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    hot = [client(served).completions.create(**settings, temperature=1, seed=5, n=3) for _ in range(2)]
    assert [c.text for c in hot[0].choices] == [c.text for c in hot[1].choices]
    assert len({c.text for c in hot[0].choices}) == 3


def test_models_health_and_metrics(served):
    assert [model.id for model in client(served).models.list()] == ["tiny"]
    with urllib.request.urlopen(served[1] + "/health") as answer:
        assert answer.read() == b'{"status": "ok"}'
    with urllib.request.urlopen(served[1] + "/metrics") as answer:
        text = answer.read().decode()
    assert re.search(r'dsv2_requests_total\{path="/v1/completions",status="200"\} [1-9]', text)
    assert re.search(r"dsv2_new_tokens_total [1-9]", text)
    assert "dsv2_pages_held 0.0" in text


def refusal(address: str, path: str, body: bytes, key: str = "") -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address + path, data=body or None, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    return caught.value.code, caught.value.read().decode()


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/v1/completions", b"{", 400, "the body is not JSON"),
        ("/v1/completions", b"\xff\xfe", 400, "the body is not JSON"),
        ("/v1/completions", b"[" * 15_000, 400, "the body is not JSON"),
        ("/v1/completions", b"[1]", 400, "the body must be a JSON object"),
        ("/v1/completions", b'{"prompt": "x", "temperature": -1}', 400, "temperature must be finite and at least 0"),
        ("/v1/completions", b'{"prompt": [9999]}', 400, "prompt ids must be from 0 to 511"),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "the body is not JSON"),
        ("/v1/completions", b'{"prompt": "x", "temperature": 1e999}', 400, "temperature must be a number, not inf"),
        ("/v1/completions", b'{"prompt": "x", "max_tokens": 999}', 400, "exceed the limit of 256"),
        ("/v1/completions", b'{"prompt": "x", "model": "other"}', 404, "'other' does not exist"),
        ("/v1/completions", b'{"prompt": "' + b"x" * 30_000 + b'"}', 413, "the body is too large"),
        ("/v1/nothing", b"{}", 404, "unknown path /v1/nothing"),
        ("/v1/models", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_mistakes_are_reported(served, path, body, status, told):
    code, text = refusal(served[1], path, body)
    assert code == status
    assert told in text


def test_requests_without_the_key_are_refused(engine, words, served):
    assert served[0].worker.open == 0
    with running(engine, words, key="secret") as (_, address):
        for key in ("", "wrong"):
            assert refusal(address, "/v1/completions", b"{}", key)[0] == 401
        assert [model.id for model in client((None, address), api_key="secret").models.list()] == ["tiny"]
        with urllib.request.urlopen(address + "/health") as answer:
            assert answer.status == 200


def test_a_full_queue_refuses(engine, words, served):
    assert served[0].worker.open == 0
    with running(engine, words, requests=2) as (_, address):
        code, text = refusal(address, "/v1/completions", b'{"prompt": "x", "n": 3}')
        assert code == 429
        assert "the limit is 2" in text


class Slow:
    """A tokenizer whose `encode` waits until it may go on."""

    def __init__(self, words):
        self.words, self.calls, self.entered, self.go_on = words, 0, threading.Semaphore(0), threading.Event()

    def __getattr__(self, name):
        return getattr(self.words, name)

    def encode(self, text):
        self.calls += 1
        self.entered.release()
        assert self.go_on.wait(60)
        return self.words.encode(text)


def test_while_texts_are_read_others_are_answered(engine, words, served):
    assert served[0].worker.open == 0
    slow = Slow(words)
    with running(engine, slow, requests=3) as (_, address):
        many = json.dumps({"prompt": [""] * 4_000}).encode()
        assert "n times the number of prompts must be from 1 to 128" in refusal(address, "/v1/completions", many)[1]
        assert slow.calls == 0
        answers, settings = [], {"model": "tiny", "max_tokens": 1, "temperature": 0}
        asked = client((None, address))

        def ask() -> None:
            answers.append(asked.completions.create(prompt="import os", **settings))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert all(slow.entered.acquire(timeout=30) for _ in threads)
        with urllib.request.urlopen(address + "/health", timeout=30) as answer:
            assert answer.read() == b'{"status": "ok"}'
        code, text = refusal(address, "/v1/completions", b'{"prompt": "x"}')
        assert code == 429 and "3 requests wait or run" in text
        slow.go_on.set()
        for thread in threads:
            thread.join(30)
        assert len(answers) == 3


def opened(address: str, *parts: bytes) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    for part in parts:
        connection.sendall(part)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """The rest of the server's response. Fails by the socket's timeout if the server does not close the connection."""
    said = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            said += part
    return said


def test_clients_that_keep_the_server_waiting_are_closed(engine, words, served):
    assert served[0].worker.open == 0
    with running(engine, words, idle_seconds=0.5) as (server, address):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        silent, half = opened(address), opened(address, head[:30])
        answered = opened(address, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        bodiless = opened(address, head, b'{"prompt":')
        assert until_closed(silent) == until_closed(half) == b""
        assert until_closed(answered).endswith(b'{"status": "ok"}')  # and then nothing: kept alive, and idle
        assert b" 408 " in (said := until_closed(bodiless)) and b"the body did not arrive within 0.5 seconds" in said
        with urllib.request.urlopen(address + "/health") as answer:
            assert answer.status == 200
        assert server.worker.open == 0


def test_connections_are_counted(engine, words, served):
    assert served[0].worker.open == 0
    with running(engine, words, limit=5, idle_seconds=2.0) as (_, address):
        held = [opened(address) for _ in range(5)]
        said = until_closed(opened(address))
        assert said.startswith(b"HTTP/1.1 503 ") and b"too many connections are open" in said
        assert json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == 503
        assert [until_closed(connection) for connection in held] == [b""] * 5
        with urllib.request.urlopen(address + "/health") as answer:
            assert answer.status == 200


def test_nan_is_an_error_and_valid_json(engine, served):
    """A model that computes NaN: no text, no `NaN` in an answer, and the server continues."""

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    good = jax.tree.map(jax.numpy.asarray, random_params(MODEL))
    bad = good | {"head": good["head"] | {"norm_D": good["head"]["norm_D"].at[0].set(jax.numpy.nan)}}
    body = {"prompt": "import os", "max_tokens": 3, "logprobs": 2, "temperature": 0, "n": 2}
    try:
        engine.replace(bad)
        code, text = refusal(served[1], "/v1/completions", json.dumps(body).encode())
        assert code == 500 and "the model computed NaN" in strict(text)["error"]["message"]
        response = httpx.post(served[1] + "/v1/completions", json=body | {"stream": True}, timeout=60)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert "the model computed NaN" in strict(lines[-1])["error"]["message"]
        settle(served[0])
    finally:
        engine.replace(good)
    with urllib.request.urlopen(served[1] + "/health") as answer:
        assert answer.status == 200


PROMPTS = ["import os", "class Thing:", "for i in range(3):", "the quick brown", "return None  # ", "x = [1, 2, 3]"]


async def crowd(address: str, count: int) -> list[str | None]:
    """Each client's answer; None for every third, which disconnects after some parts of its stream."""
    many = openai.DefaultAsyncHttpxClient(limits=httpx.Limits(max_connections=None))
    async with openai.AsyncOpenAI(base_url=address + "/v1", api_key="x", max_retries=0, http_client=many) as asked:

        async def one(i: int) -> str | None:
            settings: dict = {"model": "tiny", "prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 16, "temperature": 0}
            if i % 3 == 1:
                return (await asked.completions.create(**settings)).choices[0].text
            stream, text, parts = await asked.completions.create(**settings, stream=True), "", 0
            async for part in stream:
                text, parts = text + part.choices[0].text, parts + 1
                if i % 3 == 2 and parts > i % 5:
                    await stream.close()
                    return None
            return text

        return await asyncio.gather(*(one(i) for i in range(count)))


def settle(server: Server) -> None:
    """Waits until the requests of disconnected clients have ended."""
    for _ in range(400):
        if not server.worker.open and not server.engine.unfinished:
            return
        time.sleep(0.05)
    raise AssertionError("requests of clients that left still run")


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_many_clients_a_third_of_whom_disconnect(served, expected, count):
    server, address = served
    wanted = {prompt: expected(prompt, 16).text for prompt in PROMPTS}
    answers = asyncio.run(crowd(address, count))
    for i, text in enumerate(answers):
        assert text == (None if i % 3 == 2 else wanted[PROMPTS[i % len(PROMPTS)]])
    settle(server)
    assert server.engine.replicas[0].pages.held == 0
    assert not server.engine.replicas[0].running and not server.engine.replicas[0].waiting


@pytest.mark.slow
def test_sigterm_lets_running_requests_end(tmp_path):
    make_run(tmp_path, MODEL)
    give_tokenizer(tmp_path)
    flags = ["--port", "0", "--name", "tiny", "--capacity.rows", "1", "--capacity.chunk", "64"]
    command = [sys.executable, "-m", "dsv2_jax.serve", "--checkpoint", str(tmp_path), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
        assert address
        asked = client((None, address[0]))
        stream = asked.completions.create(model="tiny", prompt="x", max_tokens=600, temperature=0, stream=True)
        parts = [next(stream)]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            asked.completions.create(model="tiny", prompt="x", max_tokens=1)
        parts += stream
        assert parts[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) == 0
    finally:
        process.kill()
