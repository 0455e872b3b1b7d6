"""Built-in instruction data: questions and answers from verifiable tasks of reasoning-gym and from the corpus.

All data are generated from fixed seeds. None comes from a benchmark: generators that rephrase test items (such as
GSM8K's) are not used. Tasks are sized for models of a few million parameters. A question's text decides whether it is
held out (see `held_out`), so conversations, preferences and prompts agree: no form trains on another's held-out
questions.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import reasoning_gym

from dsv2_jax.config import check

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "simple_equations": {
        "min_terms": 2,
        "max_terms": 2,
        "min_value": 1,
        "max_value": 9,
        "operators_weights": [0.5, 0.5, 0.0],
    },
    "aiw": {"max_entities": 9},
    "family_relationships": {},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 3},
}
NEXT_LINE = "next_line"  # a task from the built-in corpus, for conversations only: it has no verifier
_DRAWN = 10_000  # questions per task
_TAUGHT = 3000  # of these in conversations and preferences; GRPO uses all
_LENGTHS = (1, 1, 2, 3)  # questions per conversation, cyclically
_SEED = 1
_HELD_OUT = 8  # one question in 8 is held out
_LINE = (20, 80)  # shortest and longest line of a `next_line` question, in characters
_GAP = 40  # lines between two `next_line` questions of a document


class Made(NamedTuple):
    """A document of the built-in data: its name, its JSON value, and whether it is held out."""

    name: str
    value: Any
    held_out: bool


class Question(NamedTuple):
    """A question's text, and its item, whose `answer` is right."""

    text: str
    item: dict[str, Any]


def held_out(question: str) -> bool:
    """Whether a question is held out: one in 8, by a hash of its sorted words.

    So 3 + 4 and 4 + 3 are in the same split. Single letters, the names of variables, are ignored.
    """
    words = " ".join(sorted(re.findall(r"\d+|\w{2,}", question)))
    return hashlib.blake2b(words.encode(), digest_size=8).digest()[0] % _HELD_OUT == 0


def questions(task: str, count: int, seed: int) -> Any:
    """`count` questions of a task: a data set of reasoning-gym, which can also score answers."""
    return reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task])


@functools.cache
def drawn(task: str) -> list[Question]:
    """The questions of all forms. Held-out questions occur once; training questions keep their repetitions."""
    found, seen = [], set()
    for item in questions(task, _DRAWN, _SEED):
        text = item["question"].strip()
        if not (held_out(text) and text in seen):
            found.append(Question(text, item))
        seen.add(text)
    return found


def chosen(tasks: Sequence[str], form: str) -> tuple[str, ...]:
    """The given tasks, or without any all tasks of a form.

    Raises ValueError for an unknown task, and for a form that has no built-in data.
    """
    check(form in _MAKE, f"there are no built-in {form}; give --data.source a file or a folder")
    known = (*TASKS, NEXT_LINE) if form == "conversations" else tuple(TASKS)
    for task in tasks:
        check(task in known, f"data.tasks: no task {task!r} for {form}; there are {', '.join(known)}")
    return tuple(tasks or known)


def make(form: str, tasks: Sequence[str], texts: Iterable[str]) -> Iterator[Made]:
    """All documents of a form (`data.form`). texts: of the corpus, for `NEXT_LINE`."""
    for task in tasks:
        if task == NEXT_LINE:
            yield from _MAKE[form](task, next_lines(texts))
        else:
            yield from _MAKE[form](task, drawn(task) if form == "prompts" else drawn(task)[:_TAUGHT])


def conversations(task: str, questions: Iterable[Question]) -> Iterator[Made]:
    """The `messages` of every conversation. All questions of a conversation are of the same split."""
    by_split: dict[bool, list[Question]] = {False: [], True: []}
    for question in questions:
        by_split[held_out(question.text)].append(question)
    for kept, those in by_split.items():
        left, number = iter(those), 0
        while some := list(itertools.islice(left, _LENGTHS[number % len(_LENGTHS)])):
            messages = [
                message
                for question in some
                for message in (
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": question.item["answer"]},
                )
            ]
            yield Made(f"{task}/{number}{'-held-out' * kept}", messages, kept)
            number += 1


def prompts(task: str, questions: Iterable[Question]) -> Iterator[Made]:
    """An item per question: `prompt`, and the fields that the reward `task` needs."""
    for number, (text, item) in enumerate(questions):
        yield Made(f"{task}/{number}", {**item, "task": task, "prompt": text}, held_out(text))


def preferences(task: str, questions: Iterable[Question]) -> Iterator[Made]:
    """A preference per question: its own answer over another question's answer."""
    items = list(prompts(task, questions))
    for number, (name, item, kept) in enumerate(items):
        others = (items[(number + ahead) % len(items)].value["answer"] for ahead in range(1, len(items)))
        wrong = next((answer for answer in others if answer != item["answer"]), None)
        if wrong is not None:
            yield Made(name, {"prompt": item["prompt"], "chosen": item["answer"], "rejected": wrong}, kept)


_MAKE = {"conversations": conversations, "prompts": prompts, "preferences": preferences}  # by form


def next_lines(texts: Iterable[str]) -> Iterator[Question]:
    """Questions for the next line, from lines of medium length, several per text."""
    shortest, longest = _LINE
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for first, second in zip(lines[::_GAP], lines[1::_GAP], strict=False):
            if all(shortest <= len(line) <= longest for line in (first, second)):
                yield Question(f"Which line follows this one? {first}", {"answer": second})


def text_of(made: Made) -> str:
    """The document's text in the corpus."""
    return json.dumps(made.value)
