"""Rewards that need no model: they compare answers, run programs, and check forms and lengths (section 4.2).

A reward takes a data item and the text of a response, and returns a number. Rewards may be called from several threads
and processes. Nothing in a response runs in this process: programs, and libraries that evaluate parts of a text, run in
the sandbox.
"""

import ast
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from dsv2_jax import sandbox
from dsv2_jax.config import check
from dsv2_jax.sandbox.worker import Workers

Item = Mapping[str, Any]
Reward = Callable[[Item, str], float]

# Tasks of reasoning-gym 0.1.25 whose own score function was reviewed: it compares texts and numbers, evaluates nothing,
# and takes time linear in the response. Other tasks with their own score function are refused, because several evaluate
# the response as Python.
_REVIEWED = {
    "ab", "chain_sum", "circuit_logic", "color_cube_rotation", "decimal_chain_sum", "dice", "emoji_mystery",
    "family_relationships", "figlet_font", "futoshiki", "gsm_symbolic", "mini_sudoku", "needle_haystack",
    "number_format", "palindrome_generation", "path_star", "products", "self_reference", "sentence_reordering",
    "spell_backward", "sudoku", "zebra_puzzles",
}  # fmt: skip
_FORM_SECONDS = 1.0
_MATHS_SECONDS = 10.0
_MAX_CHARACTERS = 20_000  # `maths` looks for the answer in the last characters of a response, this number of them
_SECONDS, _MAX_SECONDS = 5.0, 60.0  # time limit of a program with its tests: the default, and the maximum allowed

_equal = Workers(Path(__file__).with_name("equal.py"), "equal", _MATHS_SECONDS)
_matches = Workers(Path(__file__).with_name("matching.py"), "matches", _FORM_SECONDS)


def task(item: Item, response: str) -> float:
    """reasoning-gym's score, 0 to 1, for one of its items; the item's `task` names the generator.

    Raises ValueError for a task whose score function was not reviewed (see `check_item`).
    """
    return float(_score(item["task"])(response.strip(), dict(item)))


def maths(item: Item, response: str) -> float:
    """1 if the last answer in the response (boxed, a formula or a number) equals the item's `answer`, else 0.

    Only the last 20,000 characters are searched. An answer that takes more than 10 seconds of CPU time gives 0.
    """
    return float(_equal(item["answer"], response[-_MAX_CHARACTERS:]) is True)


def code(item: Item, response: str) -> float:
    """1 if the response's last Python code block, or without one the response, passes the item's `tests`, else 0.

    `tests` is Python source that runs after the program, uses its names, and raises on failure. Program and tests run
    in separate processes of the sandbox and together have the item's `seconds`, 5 by default.
    """
    return float(sandbox.solves(response, item["tests"], seconds=item.get("seconds", _SECONDS)))


def form(item: Item, response: str) -> float:
    """1 if the item's `pattern`, a regular expression, matches the full response, else 0.

    A match that takes more than one second of CPU time gives 0.
    """
    return float(_matches(item["pattern"], response.strip()) is True)


def brevity(item: Item, response: str) -> float:
    """1 up to the item's `most_characters`, then linearly down to 0 at twice that length."""
    most = item["most_characters"]
    return max(0.0, min(1.0, 2.0 - len(response) / most))


def check_item(rewards: Sequence[str], item: Item, where: str) -> None:
    """Checks that an item has the fields that these rewards need; names that are not in `REWARDS` need none.

    Raises ValueError, starting with `where`, for a missing or unusable field.
    """
    for reward in rewards:
        fields = REWARDS[reward].fields if reward in REWARDS else {}
        for name, field in fields.items():
            value = item.get(name, field.default)
            check(isinstance(value, field.kind), f"{where}: the reward {reward} needs {name!r}, {_KINDS[field.kind]}")
            problem = field.problem(value)
            check(not problem, f"{where}: {name} {value!r} {problem}")


def _task_problem(name: str) -> str:
    if name not in DATASETS:
        return "is no task of reasoning-gym"
    return "" if _is_safe(name) else "is refused: its score function runs the response or was not reviewed"


def _is_safe(name: str) -> bool:
    return name in _REVIEWED or DATASETS[name][0].score_answer is ProceduralDataset.score_answer  # compares texts


@functools.cache
def _score(name: str) -> Callable[[str, dict[str, Any]], float]:
    problem = _task_problem(name)
    check(not problem, f"the task {name!r} {problem}")
    score: Any = reasoning_gym.get_score_answer_fn(name)
    return score


def _pattern_problem(pattern: str) -> str:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error}"
    return ""


def _tests_problem(tests: str) -> str:
    try:
        ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"is no Python: {error}"
    return ""


def _seconds_problem(seconds: float) -> str:
    return "" if 0 < seconds <= _MAX_SECONDS else f"is not in 0 to {_MAX_SECONDS:g}"


def _length_problem(most: float) -> str:
    return "" if most > 0 else "is not positive"


_NUMBER = (int, float)
_KINDS: dict[Any, str] = {str: "a text", _NUMBER: "a number"}


class ItemField(NamedTuple):
    """A field that a reward reads in an item.

    problem(value): what is wrong with a value of the right kind; "" if nothing is. default: the value of an item
    without the field; None if every item must have it.
    """

    kind: Any  # a key of `_KINDS`
    problem: Callable[[Any], str] = lambda _: ""
    default: Any = None


class Verifier(NamedTuple):
    """A reward with the fields that it needs in an item."""

    reward: Reward
    fields: dict[str, ItemField]


REWARDS = {
    "task": Verifier(task, {"task": ItemField(str, _task_problem), "answer": ItemField(str)}),
    "maths": Verifier(maths, {"answer": ItemField(str)}),
    "code": Verifier(
        code, {"tests": ItemField(str, _tests_problem), "seconds": ItemField(_NUMBER, _seconds_problem, _SECONDS)}
    ),
    "form": Verifier(form, {"pattern": ItemField(str, _pattern_problem)}),
    "brevity": Verifier(brevity, {"most_characters": ItemField(_NUMBER, _length_problem)}),
}
