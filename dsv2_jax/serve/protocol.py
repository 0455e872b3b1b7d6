"""OpenAI's API: parsing and checking request bodies, and building responses."""

import dataclasses
import itertools
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from dsv2_jax import cli
from dsv2_jax.config import check
from dsv2_jax.data import chat
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference.request import TOP, Request, RequestEvent, Result
from dsv2_jax.inference.sampling import Sampling

Kind = Literal["completion", "chat"]

_SHARED = {
    *("model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logit_bias"),
    *("logprobs", "user", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty"),  # common extensions of OpenAI's API
}
_FIELDS = {
    "completion": _SHARED | {"prompt", "echo", "best_of", "suffix"},
    "chat": _SHARED | {"messages", "max_completion_tokens", "top_logprobs"},
}
_NUMBERS: Any = (int, float)
_MAX_SEQUENCES = 128  # of one call


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiCall:
    """A parsed request body. requests: `n` for each prompt, in the order of the prompts."""

    kind: Kind
    id: str
    created: int
    model: str
    requests: tuple[Request, ...]
    stream: bool
    usage: bool  # whether the last chunk of a stream has the usage
    echo: bool
    logprobs: bool
    n: int


def parse(kind: Kind, body: Any, model: str, tokenizer: Tokenizer, max_length: int) -> ApiCall:
    """Parses a body. Raises ValueError naming the wrong field, FileNotFoundError for another model."""
    check(isinstance(body, dict), "the body must be a JSON object")
    for name in body:
        check(name in _FIELDS[kind], f"unknown field {name!r}{cli.nearest(name, sorted(_FIELDS[kind]))}")
    body = {name: value for name, value in body.items() if value is not None}
    if _get(body, "model", str, model) != model:
        raise FileNotFoundError(f"the model {body['model']!r} does not exist; this server serves {model!r}")
    for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("best_of", body.get("n", 1))):
        check(body.get(name, neutral) == neutral, f"{name} is not supported; leave it out")
    check(not body.get("suffix"), "suffix is not supported; leave it out")
    texts = _prompts(body) if kind == "completion" else [body.get("messages")]
    n = _get(body, "n", int, 1)  # checked before the prompts are tokenized
    check(
        n >= 1 and n * len(texts) <= _MAX_SEQUENCES, f"n times the number of prompts must be from 1 to {_MAX_SEQUENCES}"
    )
    encode = _encode if kind == "completion" else chat_prompt
    prompts = [encode(text, tokenizer) for text in texts]
    echo = _get(body, "echo", bool, False)
    logprobs, top = _logprobs(kind, body)
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    seed = _get(body, "seed", int, secrets.randbits(31))
    options = body.get("stream_options", {})
    check(isinstance(options, dict), "stream_options must be an object")

    def request(prompt: list[int], i: int) -> Request:
        left = max_length - len(prompt)
        check(left > 0, f"the prompt has {len(prompt)} tokens; the limit for prompt and answer is {max_length}")
        new = _get(body, limit, int, 16 if kind == "completion" else left)
        check(new > 0 or (new == 0 and echo and logprobs), f"{limit} must be positive")
        return Request(
            prompt=tuple(prompt),
            max_new=new,
            sampling=_sampling(body),
            seed=seed + i,
            stop_ids=(tokenizer.eos_id,),
            stop=_stop(body),
            text=True,
            top=top,
            score_from=1 if echo and logprobs else None,
        )

    return ApiCall(
        kind=kind,
        id=("cmpl-" if kind == "completion" else "chatcmpl-") + secrets.token_hex(12),
        created=int(time.time()),
        model=model,
        requests=tuple(request(prompt, i) for prompt in prompts for i in range(n)),
        stream=_get(body, "stream", bool, False),
        usage=_get(options, "include_usage", bool, False),
        echo=echo,
        logprobs=logprobs,
        n=n,
    )


def chat_prompt(messages: Any, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a conversation, ready for the assistant's next message."""
    check(isinstance(messages, list) and bool(messages), "messages must be a list with at least one message")
    read = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        check(isinstance(message, dict), f"{where} must be an object")
        content = message.get("content")
        if isinstance(content, list):  # content parts: only text is supported
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(t, str) for t in texts) else None
        role = {"developer": "system"}.get(message.get("role"), message.get("role"))
        check(role in chat.ROLES, f"{where}.role must be system, user or assistant, not {role!r}")
        read.append({"role": role, "content": _text(f"{where}.content", content)})
    check(read[-1]["role"] == "user", "the last message must be the user's")
    return chat.encode(read, tokenizer, generation=True).ids.tolist()


def _prompts(body: dict) -> list[Any]:
    """The prompts of a completion, unchecked."""
    prompt = body.get("prompt")
    check(prompt is not None, "prompt is missing")
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


def _encode(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(_text("prompt", prompt))]
    fine = isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    check(bool(fine), "prompt must be a string, a list of strings, a list of token ids, or a list of such lists")
    return prompt


def _text(where: str, value: Any) -> str:
    fine = isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
    check(fine, f"{where} must be a string without unpaired surrogates")
    return value


def _logprobs(kind: Kind, body: dict) -> tuple[bool, int]:
    """(whether to return log-probabilities, number of alternatives)."""
    if kind == "completion":
        top = _get(body, "logprobs", int, -1)
        check(-1 <= top <= TOP, f"logprobs must be from 0 to {TOP}, not {top}")
        return top >= 0, max(top, 0)
    wanted, top = _get(body, "logprobs", bool, False), _get(body, "top_logprobs", int, 0)
    check(0 <= top <= TOP, f"top_logprobs must be from 0 to {TOP}, not {top}")
    check(wanted or not top, "top_logprobs needs logprobs to be true")
    return wanted, top


def _sampling(body: dict) -> Sampling:
    bias = body.get("logit_bias", {})
    check(isinstance(bias, dict), "logit_bias must be an object from token ids to numbers")
    pairs = []
    for token, value in bias.items():
        number = isinstance(value, _NUMBERS) and not isinstance(value, bool) and -100 <= value <= 100
        check(token.isdecimal() and number, "logit_bias must map token ids to numbers from -100 to 100")
        pairs.append((int(token), float(value)))
    return Sampling(
        temperature=_get(body, "temperature", _NUMBERS, 1.0),
        top_k=_get(body, "top_k", int, 0),
        top_p=_get(body, "top_p", _NUMBERS, 1.0),
        min_p=_get(body, "min_p", _NUMBERS, 0.0),
        repetition_penalty=_get(body, "repetition_penalty", _NUMBERS, 1.0),
        logit_bias=tuple(pairs),
    )


def _stop(body: dict) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    fine = isinstance(stop, list) and len(stop) <= 16 and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop)
    check(bool(fine), "stop must be a string or a list of at most 16 strings of 1 to 256 characters")
    return tuple(stop)


def _get(body: dict, name: str, kind: Any, default: Any) -> Any:
    value = body.get(name, default)
    expected = {int: "an integer", str: "a string", bool: "true or false"}.get(kind, "a number")
    fine = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fine = fine and (not isinstance(value, float) or math.isfinite(value))  # 1e999 is JSON
    check(fine, f"{name} must be {expected}, not {value!r}")
    return value


def answer(call: ApiCall, results: Sequence[Result], tokenizer: Tokenizer) -> dict:
    """The response to a call that does not stream."""
    choices = []
    for i, (request, result) in enumerate(zip(call.requests, results, strict=True)):
        choice: dict[str, Any] = {"index": i, "finish_reason": result.reason, "logprobs": None}
        if call.kind == "chat":
            choice["message"] = {"role": "assistant", "content": result.text}
            if call.logprobs:
                tokens = zip(result.tokens, result.logprobs, result.top, strict=True)
                choice["logprobs"] = {"content": [_chat_logprob(*one, tokenizer) for one in tokens]}
        else:
            before = tokenizer.decode(_shown(request, tokenizer)) if call.echo else ""
            choice["text"] = before + result.text
            if call.logprobs:
                choice["logprobs"] = _completion_logprobs(call, request, result, tokenizer)
        choices.append(choice)
    return _head(call, stream=False) | {"choices": choices, "usage": usage(call, results)}


def chunk(call: ApiCall, index: int, event: RequestEvent, tokenizer: Tokenizer, first: bool) -> dict:
    """The chunk of a stream for one event."""
    choice: dict[str, Any] = {"index": index, "finish_reason": event.reason, "logprobs": None}
    if call.kind == "chat":
        choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": event.text}
        if call.logprobs and event.token is not None:
            choice["logprobs"] = {"content": [_chat_logprob(event.token, event.logprob, event.top, tokenizer)]}
    else:
        before = tokenizer.decode(_shown(call.requests[index], tokenizer)) if call.echo and first else ""
        choice["text"] = before + event.text
        if call.logprobs and event.token is not None:
            choice["logprobs"] = _columns([(event.token, event.logprob, event.top)], tokenizer)
    return _head(call, stream=True) | {"choices": [choice]}


def last_chunk(call: ApiCall, results: Sequence[Result]) -> dict:
    """The last chunk of a stream, with the usage."""
    return _head(call, stream=True) | {"choices": [], "usage": usage(call, results)}


def usage(call: ApiCall, results: Sequence[Result]) -> dict:
    """Token counts: every prompt once, and all answers."""
    prompt = sum(len(request.prompt) for request in call.requests[:: call.n])
    new = sum(len(result.tokens) for result in results)
    reused = sum(result.reused for result in results[:: call.n])
    details = {"cached_tokens": reused}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": details,
    }


def _head(call: ApiCall, stream: bool) -> dict:
    kind = "text_completion" if call.kind == "completion" else "chat.completion" + ".chunk" * stream
    return {"id": call.id, "object": kind, "created": call.created, "model": call.model}


def _shown(request: Request, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt without the begin-of-sequence token that was prepended."""
    return request.prompt[1:] if request.prompt[0] == tokenizer.bos_id else request.prompt


def _chat_logprob(token: int, logprob: float, top: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> dict:
    def one(token: int, logprob: float) -> dict:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return one(token, logprob) | {"top_logprobs": [one(*pair) for pair in top]}


def _columns(rows: Sequence[tuple[int, float | None, Sequence[tuple[int, float]]]], tokenizer: Tokenizer) -> dict:
    texts = [tokenizer.decode([token]) for token, _, _ in rows]
    return {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob, _ in rows],
        "top_logprobs": [{tokenizer.decode([t]): p for t, p in top} or None for _, _, top in rows],
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
    }


def _completion_logprobs(call: ApiCall, request: Request, result: Result, tokenizer: Tokenizer) -> dict:
    rows: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = []
    if call.echo:
        scored = [None, *(logprob for logprob, _ in result.scores)]
        shown = len(_shown(request, tokenizer))
        rows += [(token, logprob, ()) for token, logprob in list(zip(request.prompt, scored, strict=True))[-shown:]]
    rows += zip(result.tokens, result.logprobs, result.top, strict=True)
    return _columns(rows, tokenizer)
