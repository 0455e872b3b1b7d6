"""What bodies mean, and which are refused with which words; no engine and no network."""

import dataclasses

import pytest

from dsv2_jax.data import chat, tokenizer
from dsv2_jax.inference.request import Result
from dsv2_jax.serve import protocol


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = "User: hello there, what is the answer?\n\nAssistant: it is forty-two, as always. " * 50
    return tokenizer.train([text], 330, tmp_path_factory.mktemp("words"))


def parse(words, kind="completion", max_length=100, **body):
    return protocol.parse(kind, body, "m", words, max_length)


def test_prompts_of_every_form(words):
    ids = words.encode("hello")
    for prompt, expected in [
        ("hello", [(words.bos_id, *ids)]),
        (["hello", ""], [(words.bos_id, *ids), (words.bos_id,)]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ]:
        call = parse(words, prompt=prompt)
        assert [request.prompt for request in call.requests] == expected
        assert all(request.stop_ids == (words.eos_id,) and request.max_new == 16 for request in call.requests)


def test_settings_reach_the_request(words):
    call = parse(
        words,
        prompt="x",
        n=2,
        seed=7,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.2,
        logit_bias={"5": -100},
        stop="end",
        logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, second = call.requests
    assert second == dataclasses.replace(first, seed=8)
    s = first.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.5, 0.9, 4, 0.1, 1.2)
    assert (s.logit_bias, first.stop, first.top, first.max_new) == (((5, -100.0),), ("end",), 2, 3)
    assert call.stream and call.usage and call.logprobs


def test_chat_follows_the_template(words):
    bos, eos, encode = words.bos_id, words.eos_id, words.encode
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "it is"},
        {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is"}]},
    ]
    first = encode("be kind\n\nUser: hello\n\nAssistant: it is")
    expected = [bos, *first, eos, *encode("User: what is\n\nAssistant:")]
    (request,) = parse(words, "chat", messages=messages).requests
    assert list(request.prompt) == expected
    assert request.max_new == 100 - len(expected)  # all that the limit leaves


def test_what_the_template_refuses_is_the_clients_mistake(words):
    template = chat.Template("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x", {})
    strict = dataclasses.replace(words, template=template)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="the chat template refuses these messages: no system"):
        parse(strict, "chat", messages=messages)


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("completion", {}, "prompt is missing"),
        ("completion", {"prompt": "x", "max_token": 3}, "unknown field 'max_token'; did you mean max_tokens"),
        ("completion", {"prompt": 5}, "prompt must be a string"),
        ("completion", {"prompt": [[1], [2.5]]}, "prompt must be a string"),
        ("completion", {"prompt": "x", "max_tokens": 0}, "max_tokens must be positive"),
        ("completion", {"prompt": "x", "max_tokens": "3"}, "max_tokens must be an integer, not '3'"),
        ("completion", {"prompt": "x", "temperature": True}, "temperature must be a number, not True"),
        ("completion", {"prompt": "x", "temperature": -1}, "temperature must be finite and at least 0"),
        ("completion", {"prompt": "x", "stop": ["a", ""]}, "stop must be a string or a list"),
        ("completion", {"prompt": "x", "n": 1000}, "n times the number of prompts must be from 1 to 128"),
        ("completion", {"prompt": "x", "logprobs": 21}, "logprobs must be from 0 to 20"),
        ("completion", {"prompt": "x", "best_of": 4}, "best_of is not supported"),
        ("completion", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias must map token ids"),
        ("completion", {"prompt": [3] * 100}, "the prompt has 100 tokens; the limit for prompt and answer is 100"),
        ("chat", {"messages": []}, "messages must be a list with at least one message"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role must be system, user"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content must"),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ("chat", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs to be true"),
    ],
)
def test_what_cannot_be_is_refused(words, kind, body, told):
    with pytest.raises(ValueError, match=told):
        parse(words, kind, **body)


def test_another_model_is_not_found(words):
    with pytest.raises(FileNotFoundError, match="'gpt' does not exist; this server serves 'm'"):
        parse(words, prompt="x", model="gpt")


def test_usage_counts_a_prompt_once(words):
    call = parse(words, prompt=["hello", "it"], n=3)
    result = Result(tokens=(1, 2), logprobs=(0.0, 0.0), top=((), ()), text="", reason="length", scores=(), reused=0)
    prompt = len(call.requests[0].prompt) + len(call.requests[3].prompt)
    told = protocol.usage(call, [result] * 6)
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (prompt, 12, prompt + 12)
