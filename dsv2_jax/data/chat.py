"""Conversations in a checkpoint's chat template: their text, their ids, and the mask of the assistant's answers.

A template is a Jinja program from the checkpoint. It runs in Jinja's sandbox, with the variables and functions that
transformers provides. Only the template writes control tokens; the content of a message is always encoded as text.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from dsv2_jax.config import check

if TYPE_CHECKING:  # tokenizer.py imports this module
    from dsv2_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# DeepSeek-V2's template, for tokenizers without one. Blank lines separate its parts: {bos}system text, User: text,
# Assistant: text{eos}.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

Messages = Sequence[dict[str, str]]  # each {"role": one of ROLES, "content": text}

# Marks that open and close parts of a rendered text: halves of surrogate pairs, which valid text does not contain.
_MARKS = {"answer": ("\ud800", "\ud801"), "other": ("\ud802", "\ud803"), "generation": ("\ud804", "\ud805")}
_KIND = {mark: kind for kind, pair in _MARKS.items() for mark in pair}
_HALF = re.compile("[\ud800-\udfff]")

# What templates keep of a message: all, all but spaces at its ends, or the part after the reasoning.
_KEPT: tuple[Callable[[str], str], ...] = (str, str.strip)
_KEPT_OF_ANSWERS = (*_KEPT, lambda text: text.rpartition("</think>")[2], lambda t: t.rpartition("</think>")[2].strip())


class Encoded(NamedTuple):
    """ids int32 [n]; answers bool [n]: the ids of the assistant's answers, with their end tokens."""

    ids: np.ndarray
    answers: np.ndarray


class Attributed(NamedTuple):
    """A conversation as text, and the origin of its characters.

    said: (start, stop) of every message's text, in order; the rest is the template's. answers: (start, stop, limit) of
    the assistant's answers; the template may put an end token between `stop` and `limit`.
    """

    text: str
    said: list[tuple[int, int]]
    answers: list[tuple[int, int, int]]


class Template:
    """A compiled chat template. names: the tokenizer's special tokens by key, such as `bos_token`."""

    def __init__(self, source: str, names: dict[str, str]):
        """Raises ValueError if the source is not valid Jinja."""
        self.source, self._names = source, names
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None

    def render(self, messages: Messages, *, generation: bool = False) -> str:
        """The conversation as text; with `generation`, followed by the prompt for the assistant's next answer.

        Raises ValueError for messages that the template rejects.
        """
        return _HALF.sub("", self._run(messages, generation, datetime.datetime.now()))

    def attribute(self, messages: Messages, *, generation: bool = False) -> Attributed:
        """The text of `render` with the origin of its characters.

        Runs the template again with marks around the kept part of each message, and checks that the text without marks
        is the same. Raises ValueError if it is not, and as `render` does.
        """
        check(not any(_HALF.search(m["content"]) for m in messages), "a message holds an unpaired surrogate")
        now = datetime.datetime.now()  # equal in all runs of the template
        text = _HALF.sub("", self._run(messages, generation, now))
        for of_answers, of_others in itertools.product(_KEPT_OF_ANSWERS, _KEPT):
            kept = [(of_answers if m["role"] == "assistant" else of_others)(m["content"]) for m in messages]
            spans = self._spans(messages, kept, generation, now, text)
            if spans is None:
                continue
            said = [(start, stop) for kind, start, stop in spans if kind != "generation"]
            answers = [(start, stop, stop) for kind, start, stop in spans if kind == "generation"]
            return Attributed(text, said, answers or self._answers(messages, spans, now, text))
        raise ValueError(
            f"the chat template changes the content of messages, which is not supported {_where(messages)}"
        )

    def _run(self, messages: Messages, generation: bool, now: datetime.datetime) -> str:
        """The template's output, with marks around its generation blocks."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation,
                strftime_now=now.strftime,
                **self._names,
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses these messages: {reason} {_where(messages)}") from None

    def _spans(
        self, messages: Messages, kept: list[str], generation: bool, now: datetime.datetime, text: str
    ) -> list[tuple[str, int, int]] | None:
        """(kind, start, stop) of the marked parts, in order; None if the template keeps other parts than `kept`."""

        def given(contents: list[str]) -> Messages:
            return [m | {"content": content} for m, content in zip(messages, contents, strict=True)]

        marks = [_MARKS["answer" if m["role"] == "assistant" else "other"] for m in messages]
        marked = [begin + content + end for (begin, end), content in zip(marks, kept, strict=True)]
        try:
            found = _unmarked(self._run(given(marked), generation, now))
            if found is None or found[0] != text:
                return None
            shown = {text[start:stop] for kind, start, stop in found[1] if kind != "generation"}
            rest = [m["content"] if content in shown else "" for m, content in zip(messages, kept, strict=True)]
            # A message that lost its marks must not appear in parts.
            same = shown == set(kept) or text == _HALF.sub("", self._run(given(rest), generation, now))
        except ValueError:
            return None
        return found[1] if same and shown <= set(kept) else None

    def _answers(
        self, messages: Messages, spans: list[tuple[str, int, int]], now: datetime.datetime, text: str
    ) -> list[tuple[int, int, int]]:
        """Spans of the answers. Each starts right after the template's generation prompt, maybe before the text."""
        if all(kind != "answer" for kind, _, _ in spans):
            return []
        before = list(itertools.takewhile(lambda m: m["role"] != "assistant", messages)) or messages
        try:
            request, without = (_HALF.sub("", self._run(before, generation, now)) for generation in (True, False))
        except ValueError:
            request = without = ""
        request = request.removeprefix(without) if request.startswith(without) else ""
        answers, end = [], 0
        limits = [*(start for _, start, _ in spans[1:]), len(text)]
        for (kind, start, stop), limit in zip(spans, limits, strict=True):
            if kind == "answer":
                found = text.rfind(request, end, start) if request else -1
                answers.append((found + len(request) if found >= 0 else start, stop, limit))
            end = stop
        return answers


def checked(value: Any, where: str) -> list[dict[str, str]]:
    """The value as messages. Raises ValueError, starting with `where`, if it is not a list of messages."""
    check(isinstance(value, list) and bool(value), f"{where} must be a list of messages with a role and a content")
    for message in value:
        check(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str),
            f"{where}: each message must hold a role and a content, both strings",
        )
        check(message["role"] in ROLES, f"{where}: the role {message['role']!r} is not one of {', '.join(ROLES)}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def encode(messages: Messages, tokenizer: Tokenizer, *, generation: bool = False) -> Encoded:
    """The ids of the conversation in the tokenizer's template; with `generation`, followed by the generation prompt.

    Text between control tokens is tokenised as one piece, as in transformers, so a token may start in the template and
    end in a message. An answer's ids start after the template's generation prompt. They end with the end of sequence
    that the template puts after the answer, or with the first control token there. Raises ValueError as
    `Template.attribute` does.
    """
    text, said, answers = tokenizer.template.attribute(messages, generation=generation)
    borders = [0, *itertools.chain.from_iterable(said), len(text)]
    controls = [
        c for written in zip(borders[::2], borders[1::2], strict=True) for c in tokenizer.controls(text, *written)
    ]
    learnt = np.zeros(len(text), bool)
    for start, stop, limit in answers:
        ends = [(end, id) for begin, end, id in controls if stop <= begin and end <= limit]
        ends = [end for end, id in ends if id == tokenizer.eos_id] or [end for end, _ in ends]
        learnt[start : ends[0] if ends else stop] = True
    ids: list[int] = []
    starts: list[int] = []  # where each id's text starts
    done = 0
    for start, stop, id in (*controls, (len(text), len(text), None)):
        pieces = tokenizer.plain.encode(text[done:start], add_special_tokens=False)
        ids += pieces.ids
        starts += [done + first for first, _ in pieces.offsets]
        if id is not None:
            ids.append(id)
            starts.append(start)
        done = stop
    return Encoded(np.array(ids, np.int32), learnt[np.array(starts, int)])


def _where(messages: Messages) -> str:
    """Identifies the conversation in an error message."""
    return f"(the conversation that begins with {str(messages[0]['content'])[:40]!r})"


def _unmarked(marked: str) -> tuple[str, list[tuple[str, int, int]]] | None:
    """(the text without marks, (kind, start, stop) of the marked parts); None for unbalanced marks."""
    parts, length = [], 0
    opened: list[tuple[str, int]] = []
    spans = []
    for part in re.split(f"([{''.join(_KIND)}])", marked):
        kind = _KIND.get(part)
        if kind is None:
            parts.append(part)
            length += len(part)
        elif part == _MARKS[kind][0]:
            opened.append((kind, length))
        elif opened and opened[-1][0] == kind:
            spans.append((*opened.pop(), length))
        else:
            return None
    return None if opened else ("".join(parts), spans)


class _Namespace(jinja2.utils.Namespace):
    """The `namespace` of templates, without access to Python's private attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Generation(jinja2.ext.Extension):
    """{% generation %}: puts marks around the part that a template declares as the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in _MARKS["generation"])
        return [begin, *body, end]


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the blocks, filters and functions that transformers provides to templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, namespace=_Namespace)
    return environment
