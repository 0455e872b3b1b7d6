"""Conversations to learn instructions from: verifiable tasks of reasoning-gym, made anew from fixed seeds.

Nothing here comes from a benchmark: the generators that rephrase test items of one (GSM8K among them) are not used.
Tasks are sized so that a model of some million parameters can learn them.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import reasoning_gym

from dsv2_jax.config import check
from dsv2_jax.data.chat import Messages

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "letter_counting": {"min_words": 2, "max_words": 4},
}
_EACH = 8000  # questions of a task
_TURNS = (1, 1, 2, 3)  # questions of a conversation, in turn
_SEED = 1


def questions(task: str, count: int, seed: int) -> Any:
    """So many questions of a task: reasoning-gym's dataset, which also scores answers. Other seeds, other questions."""
    return reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task])


def prompts(tasks: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, item) of every built-in question: `prompt`, and what the reward `task` needs. Each question once.

    They have another seed than those of `build`, but of a task with few questions both have some of the same.
    """
    for task in tasks:
        once = {item["question"].strip(): item for item in questions(task, _EACH, _SEED + 1)}
        for number, (question, item) in enumerate(once.items()):
            yield f"{task}/{number}", {**item, "task": task, "prompt": question}


def chosen(tasks: Sequence[str]) -> tuple[str, ...]:
    """These tasks, or all for none. Raises ValueError for one that there is not."""
    for task in tasks:
        check(task in TASKS, f"data.tasks: no task {task!r}; there are {', '.join(TASKS)}")
    return tuple(tasks or TASKS)


def build(tasks: Sequence[str]) -> Iterator[tuple[str, Messages]]:
    """(name, messages) of every conversation of the built-in instruction data; some have several questions."""
    for task in tasks:
        items = (item for item in questions(task, _EACH, _SEED))
        number = 0
        while turns := list(itertools.islice(items, _TURNS[number % len(_TURNS)])):
            messages = [
                message
                for item in turns
                for message in (
                    {"role": "user", "content": item["question"].strip()},
                    {"role": "assistant", "content": item["answer"]},
                )
            ]
            yield f"{task}/{number}", messages
            number += 1


def preferences(tasks: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, preference) of every question of `prompts`: its own answer before that of another question of the task."""
    for task in tasks:
        items = list(prompts([task]))
        for number, (name, item) in enumerate(items):
            others = (items[(number + ahead) % len(items)][1]["answer"] for ahead in range(1, len(items)))
            wrong = next((answer for answer in others if answer != item["answer"]), None)
            if wrong is not None:
                yield name, {"prompt": item["prompt"], "chosen": item["answer"], "rejected": wrong}


MAKERS = {"conversations": build, "prompts": prompts, "preferences": preferences}  # by `data.form`
