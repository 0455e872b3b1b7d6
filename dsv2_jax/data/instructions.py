"""Questions and answers to learn instructions from: verifiable tasks of reasoning-gym, and lines of the corpus.

Everything is made anew from fixed seeds. Nothing comes from a benchmark: the generators that rephrase test items of one
(GSM8K among them) are not used. Tasks are sized so that a model of some million parameters can learn them. Whether a
question is for evaluation is decided by its words alone (see `held_out`), so that conversations, preferences and
prompts agree: what one of them is evaluated on, none of them learns.
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
NEXT_LINE = "next_line"  # of the built-in corpus: no task with a verifier, but conversations are made of it too
_DRAWN = 10_000  # questions of a task
_TAUGHT = 3000  # of them in conversations and preferences: the others are left to GRPO
_TURNS = (1, 1, 2, 3)  # questions of a conversation, in turn
_SEED = 1
_HELD_OUT = 8  # one question of so many
_LINE = (20, 80)  # characters of a line that is asked about, and of its answer
_GAP = 40  # lines of a document between two questions about it


class Made(NamedTuple):
    """A document of the built-in data: its name, what it holds, and whether it is for evaluation."""

    name: str
    value: Any
    held_out: bool


class Question(NamedTuple):
    """What the user asks, and an item whose `answer` the assistant should give."""

    asked: str
    item: dict[str, Any]


def held_out(asked: str) -> bool:
    """Whether this question is kept for evaluation: by a hash of its words in any order, one of 8.

    So 3 + 4 and 4 + 3 are on one side. Letters that stand alone do not count: they are names of variables.
    """
    words = " ".join(sorted(re.findall(r"\d+|\w{2,}", asked)))
    return hashlib.blake2b(words.encode(), digest_size=8).digest()[0] % _HELD_OUT == 0


def questions(task: str, count: int, seed: int) -> Any:
    """So many questions of a task: reasoning-gym's dataset, which also scores answers."""
    return reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task])


@functools.cache
def drawn(task: str) -> list[Question]:
    """The questions that all forms are made of: those to learn as often as they were drawn, the others once."""
    found, seen = [], set()
    for item in questions(task, _DRAWN, _SEED):
        asked = item["question"].strip()
        if not (held_out(asked) and asked in seen):
            found.append(Question(asked, item))
        seen.add(asked)
    return found


def chosen(tasks: Sequence[str], form: str) -> tuple[str, ...]:
    """These tasks, or all that a form has for none. Raises ValueError for one that there is not."""
    known = (*TASKS, NEXT_LINE) if form == "conversations" else tuple(TASKS)
    for task in tasks:
        check(task in known, f"data.tasks: no task {task!r} for {form}; there are {', '.join(known)}")
    return tuple(tasks or known)


def make(form: str, tasks: Sequence[str], texts: Iterable[str]) -> Iterator[Made]:
    """Every document of a form (`data.form`). texts: of the corpus, for `NEXT_LINE`."""
    for task in tasks:
        if form == "conversations":
            yield from conversations(task, next_lines(texts) if task == NEXT_LINE else drawn(task)[:_TAUGHT])
        else:
            yield from (prompts if form == "prompts" else preferences)(task)


def conversations(task: str, asked: Iterable[Question]) -> Iterator[Made]:
    """`messages` of every conversation; some have several questions, all to learn from or all for evaluation."""
    by_split: dict[bool, list[Question]] = {False: [], True: []}
    for question in asked:
        by_split[held_out(question.asked)].append(question)
    for kept, those in by_split.items():
        left, number = iter(those), 0
        while turns := list(itertools.islice(left, _TURNS[number % len(_TURNS)])):
            messages = [
                message
                for question in turns
                for message in (
                    {"role": "user", "content": question.asked},
                    {"role": "assistant", "content": question.item["answer"]},
                )
            ]
            yield Made(f"{task}/{number}{'-held-out' * kept}", messages, kept)
            number += 1


def prompts(task: str) -> Iterator[Made]:
    """An item of every question: `prompt`, and what the reward `task` needs."""
    for number, (asked, item) in enumerate(drawn(task)):
        yield Made(f"{task}/{number}", {**item, "task": task, "prompt": asked}, held_out(asked))


def preferences(task: str) -> Iterator[Made]:
    """A preference for every question of conversations: its own answer before that of another question of the task."""
    items = list(itertools.islice(prompts(task), _TAUGHT))
    for number, (name, item, kept) in enumerate(items):
        others = (items[(number + ahead) % len(items)].value["answer"] for ahead in range(1, len(items)))
        wrong = next((answer for answer in others if answer != item["answer"]), None)
        if wrong is not None:
            yield Made(name, {"prompt": item["prompt"], "chosen": item["answer"], "rejected": wrong}, kept)


def next_lines(texts: Iterable[str]) -> Iterator[Question]:
    """Which line follows a line, of lines of middle length, some of each text."""
    shortest, longest = _LINE
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for first, second in zip(lines[::_GAP], lines[1::_GAP], strict=False):
            if all(shortest <= len(line) <= longest for line in (first, second)):
                yield Question(f"Which line follows this one? {first}", {"answer": second})


def text_of(made: Made) -> str:
    """The document as the corpus keeps it."""
    return json.dumps(made.value)
