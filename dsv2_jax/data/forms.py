"""The forms of data (`data.form`): how a JSONL line is checked, and how its document becomes ids and rows.

A form is a row of `FORMS`. All that differs between forms while a corpus is read, tokenised and packed stands there.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from dsv2_jax.config import check
from dsv2_jax.data import chat, preferences
from dsv2_jax.data.chat import Encoded
from dsv2_jax.data.packing import PackedRows, document_ids
from dsv2_jax.data.tokenizer import Tokenizer


def _text_ids(text: str, tokenizer: Tokenizer) -> Encoded:
    ids = document_ids(tokenizer, text)
    return Encoded(ids, np.ones(len(ids), bool))


def _conversation_ids(text: str, tokenizer: Tokenizer) -> Encoded:
    return chat.encode(json.loads(text), tokenizer)


class Form(NamedTuple):
    """One form of data. A document is a text: what `read` returns for a line.

    read(value, where, text_field): the document of a JSONL line with this value. Raises ValueError, starting with
    `where`, if the value does not fit the form. text_field is `data.text_field`.
    encode(document, tokenizer): the document's ids, and which of them are targets.
    cut: the rows are cut from the joined documents, and every id is a target, as in text. Otherwise a document stays in
    one row.
    templated: `encode` depends on the chat template.
    rows(documents, tokenizer, length): packs the documents of a split itself, in place of `encode`; None otherwise.
    """

    read: Callable[[Any, str, str], str]
    encode: Callable[[str, Tokenizer], Encoded] = _text_ids
    cut: bool = False
    templated: bool = False
    rows: Callable[[Iterable[str], Tokenizer, int], PackedRows] | None = None


def _text(value: Any, where: str, text_field: str) -> str:
    check(isinstance(value, dict) and text_field in value, f"{where} has no key {text_field!r}")
    text = value[text_field]
    check(isinstance(text, str), f"{where}: {text_field!r} must hold a string, not {type(text).__name__}")
    _check_unicode(text, f"{where}: {text_field!r}")
    return text


def _conversation(value: Any, where: str, _: str) -> str:
    check(isinstance(value, dict) and "messages" in value, f"{where} has no key 'messages'")
    messages = chat.checked(value["messages"], f"{where}: 'messages'")
    check(
        any(m["role"] == "assistant" for m in messages),
        f"{where}: no message is the assistant's, so there is nothing to learn",
    )
    for message in messages:
        _check_unicode(message["content"], f"{where}: a message")
    return json.dumps(messages)


def _prompt(value: Any, where: str, _: str) -> str:
    check(isinstance(value, dict) and "prompt" in value, f"{where} has no key 'prompt'")
    if isinstance(value["prompt"], str):
        _check_unicode(value["prompt"], f"{where}: 'prompt'")
    else:
        chat.checked(value["prompt"], f"{where}: 'prompt'")
    return json.dumps(value)


def _preference(value: Any, where: str, _: str) -> str:
    if isinstance(value, dict) and "score" in value:
        check(isinstance(value["score"], int | float), f"{where}: 'score' must be a number")
        chat.checked(value.get("messages"), f"{where}: 'messages'")
        return json.dumps(value)
    names = ("prompt", "chosen", "rejected")
    check(
        isinstance(value, dict) and all(name in value for name in names),
        f"{where} must hold 'prompt', 'chosen' and 'rejected', or 'messages' and 'score'",
    )
    check(all(isinstance(value[name], str) for name in names[1:]), f"{where}: 'chosen' and 'rejected' must be strings")
    check(isinstance(value.get("margin", 0), int | float), f"{where}: 'margin' must be a number")
    return _prompt(value, where, "")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds an unpaired surrogate") from None


FORMS: dict[str, Form] = {
    "text": Form(_text, cut=True),
    "conversations": Form(_conversation, _conversation_ids, templated=True),
    "preferences": Form(_preference, rows=preferences.rows),
    "prompts": Form(_prompt),  # GRPO reads them itself; rows of them only serve to evaluate its checkpoints
}
