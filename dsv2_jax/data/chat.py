"""Conversations as the released chat models read them: the template, its tokens, and which of them are trained on.

{bos}system text, blank line
User: text, blank line
Assistant: text{eos}User: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsv2_jax.config import check

if TYPE_CHECKING:  # tokenizers carry the template
    from dsv2_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# The same in Jinja, for the tokenizer_config.json of an export: whoever loads it renders conversations alike.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

Messages = Sequence[dict[str, str]]  # each {"role": one of ROLES, "content": text}


class Encoded(NamedTuple):
    """ids int32 [n]; answers bool [n]: the ids that an assistant says, its end of sequence included."""

    ids: np.ndarray
    answers: np.ndarray


def checked(value: Any, where: str) -> list[dict[str, str]]:
    """The value as messages. Raises ValueError, which begins with `where`, if it is none or has nothing to learn."""
    check(isinstance(value, list) and bool(value), f"{where} must be a list of messages with a role and a content")
    for message in value:
        check(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str),
            f"{where}: each message must hold a role and a content, both strings",
        )
        check(message["role"] in ROLES, f"{where}: the role {message['role']!r} is none of {', '.join(ROLES)}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def render(messages: Messages, bos: str, eos: str, *, generation: bool = False) -> str:
    """The conversation as text; with `generation`, up to where the assistant's next answer begins (section 4)."""
    return "".join(text or name for text, name, _ in _parts(messages, bos, eos, generation))


def encode(messages: Messages, tokenizer: Tokenizer, *, generation: bool = False) -> Encoded:
    """The ids of `render`. What a message says cannot forge a special token.

    Text between special tokens is split as a whole, as transformers does it. So the space behind `Assistant:` is of
    the answer's first token: a prompt ends before it.
    """
    ids: list[int] = []
    answers: list[bool] = []
    run, said = "", [(0, 0)]  # text since the last special token, and the spans of it that an assistant says

    def close() -> None:
        nonlocal run, said
        pieces = tokenizer.backend.encode(run, add_special_tokens=False)
        ids.extend(pieces.ids)
        answers.extend(any(start < stop and a <= start < b for a, b in said) for start, stop in pieces.offsets)
        run, said = "", [(0, 0)]

    for text, special, spoken in _parts(messages, "bos", "eos", generation):
        if text:
            if spoken:
                said.append((len(run), len(run) + len(text)))
            run += text
            continue
        close()
        ids.append(tokenizer.bos_id if special == "bos" else tokenizer.eos_id)
        answers.append(special == "eos")
    close()
    return Encoded(np.array(ids, np.int32), np.array(answers, bool))


def _parts(messages: Messages, bos: str, eos: str, generation: bool) -> list[tuple[str, str, bool]]:
    """(text, "", whether an assistant says it) or ("", a special token's name, False), in order."""
    parts = [("", bos, False)]
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            parts += [("Assistant:", "", False), (" " + content, "", True), ("", eos, False)]
        else:
            parts += [(f"User: {content}\n\n" if message["role"] == "user" else f"{content}\n\n", "", False)]
    return parts + [("Assistant:", "", False)] * generation
