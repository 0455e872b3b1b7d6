"""Rewards that need no model: answers compared, programs run, forms and lengths checked (section 4.2).

A reward takes an item of data and the text of a response, and gives a number. Items name the reward that judges them;
`combine` weighs several, as the paper's second stage does. Rewards may be called from several threads and processes.
What a response holds is never run in this process: programs, and libraries that evaluate parts of a text, go to the
sandbox.
"""

import ast
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from dsv2_jax import sandbox
from dsv2_jax.config import check
from dsv2_jax.sandbox.worker import Workers

Item = Mapping[str, Any]
Reward = Callable[[Item, str], float]

# Tasks of reasoning-gym with a score of their own that was read for this list, version 0.1.25: it compares texts and
# numbers, evaluates nothing, and takes time in proportion to the response. Others are refused, since several evaluate
# the response as Python.
_READ = {
    "ab", "chain_sum", "circuit_logic", "color_cube_rotation", "decimal_chain_sum", "dice", "emoji_mystery",
    "family_relationships", "figlet_font", "futoshiki", "gsm_symbolic", "mini_sudoku", "needle_haystack",
    "number_format", "palindrome_generation", "path_star", "products", "self_reference", "sentence_reordering",
    "spell_backward", "sudoku", "zebra_puzzles",
}  # fmt: skip
_PYTHON = ("", "python", "python3", "py")  # tags of code blocks
_FORM_SECONDS = 1.0
_MATHS_SECONDS = 10.0
_MOST_CHARACTERS = 20_000  # of a response, from its end, that answers of maths are looked for in
_SECONDS, _MOST_SECONDS = 5.0, 60.0  # of a program with its tests

_equal = Workers(Path(__file__).with_name("equal.py"), "equal", _MATHS_SECONDS)
_matches = Workers(Path(__file__).with_name("matching.py"), "matches", _FORM_SECONDS)


def task(item: Item, response: str) -> float:
    """reasoning-gym's own score, 0 to 1, of an item of its own, whose `task` names the generator.

    Raises ValueError for a task whose score was not read (see `check_item`).
    """
    return float(_score(item["task"])(response.strip(), dict(item)))


def maths(item: Item, response: str) -> float:
    """1 if the last answer in the response (a boxed one, a formula or a number) equals the item's `answer`, else 0.

    It is looked for in the last 20,000 characters. An answer that takes more than 10 seconds of CPU time gives 0.
    """
    return float(_equal(item["answer"], response[-_MOST_CHARACTERS:]) is True)


def code(item: Item, response: str) -> float:
    """1 if the response's last block of Python, or all of it without one, passes the item's `tests`, else 0.

    `tests`: Python source that fails by raising, and uses the program's names as if it stood behind the program. It
    runs in a process of its own (`sandbox.judge`). Both have `seconds`, 5 by default.
    """
    text = response.replace("\r\n", "\n")
    blocks = re.findall(r"```([^\n`]*)\n(.*?)(?:```|\Z)", text, re.DOTALL)
    programs = [program for tag, program in blocks if tag.strip().lower() in _PYTHON]
    program = programs[-1] if programs else text
    return float(sandbox.judge(program, item["tests"], seconds=item.get("seconds", _SECONDS)).code == 0)


def form(item: Item, response: str) -> float:
    """1 if the response matches the item's `pattern`, a regular expression, as a whole, else 0.

    A pattern that takes more than a second of CPU time gives 0.
    """
    return float(_matches(item["pattern"], response.strip()) is True)


def brevity(item: Item, response: str) -> float:
    """1 up to the item's `most_characters`, then falling to 0 at twice as many."""
    most = item["most_characters"]
    return max(0.0, min(1.0, 2.0 - len(response) / most))


REWARDS: dict[str, Reward] = {"task": task, "maths": maths, "code": code, "form": form, "brevity": brevity}


def check_item(rewards: Sequence[str], item: Item, where: str) -> None:
    """Whether an item holds what these rewards need; names that are not in `REWARDS` need nothing.

    Raises ValueError, which says where, for a field that is missing or of no use.
    """
    for name in rewards:
        for field, (kinds, fit) in _NEEDS.get(name, {}).items():
            value = item.get(field, _SECONDS if field == "seconds" else None)
            check(isinstance(value, kinds), f"{where}: the reward {name} needs {field!r}, {_KINDS[kinds]}")
            problem = fit(value)
            check(not problem, f"{where}: {field} {value!r} {problem}")


def _task_problem(name: str) -> str:
    if name not in DATASETS:
        return "is no task of reasoning-gym"
    return "" if _is_safe(name) else "is scored by running the response, or by code that was not read, so it is refused"


def _is_safe(name: str) -> bool:
    return name in _READ or DATASETS[name][0].score_answer is ProceduralDataset.score_answer  # which compares texts


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


def _any(_: Any) -> str:
    return ""


_NUMBER = (int, float)
_KINDS: dict[Any, str] = {str: "a text", _NUMBER: "a number"}
_NEEDS: dict[str, dict[str, tuple[Any, Callable[[Any], str]]]] = {
    "task": {"task": (str, _task_problem), "answer": (str, _any)},
    "maths": {"answer": (str, _any)},
    "code": {
        "tests": (str, _tests_problem),
        "seconds": (
            _NUMBER,
            lambda seconds: "" if 0 < seconds <= _MOST_SECONDS else f"is not in 0 to {_MOST_SECONDS:g}",
        ),
    },
    "form": {"pattern": (str, _pattern_problem)},
    "brevity": {"most_characters": (_NUMBER, lambda most: "" if most > 0 else "is not positive")},
}


def combine(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """c1 r1 + c2 r2 + ...: the paper's mixture of helpful, safety and rule rewards (section 4.2).

    Raises ValueError for unlike numbers of rewards and weights.
    """
    check(len(rewards) == len(weights) > 0, f"{len(rewards)} rewards need as many weights, not {len(weights)}")

    def reward(item: Item, response: str) -> float:
        return sum(c * r(item, response) for c, r in zip(weights, rewards, strict=True))

    return reward
