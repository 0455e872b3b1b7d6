"""Rewards that need no model: answers compared, programs run, forms and lengths checked (section 4.2).

A reward takes an item of data and the text of a response, and gives a number. Items name the reward that judges them;
`combine` weighs several, as the paper's second stage does.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import math_verify
import reasoning_gym

from dsv2_jax.alignment import sandbox
from dsv2_jax.config import check

Item = Mapping[str, Any]
Reward = Callable[[Item, str], float]


def task(item: Item, response: str) -> float:
    """reasoning-gym's own score, 0 to 1, of an item of its own, whose `task` names the generator."""
    score: Any = reasoning_gym.get_score_answer_fn(item["task"])
    return float(score(response.strip(), dict(item)))


def maths(item: Item, response: str) -> float:
    """1 if the last answer in the response (a boxed one, a formula or a number) equals the item's `answer`, else 0."""
    gold, given = math_verify.parse(item["answer"]), math_verify.parse(response)
    return float(bool(given) and math_verify.verify(gold, given))


def code(item: Item, response: str) -> float:
    """1 if the response's last code block, or all of it without one, passes the item's `tests` in the sandbox, else 0.

    `tests`: Python source that runs behind the program in the same process and fails by raising.
    """
    blocks = re.findall(r"```(?:python)?\n(.*?)```", response, re.DOTALL)
    passed = secrets.token_hex()  # a program that ends before the tests, with code 0, does not know it
    program = f"{blocks[-1] if blocks else response}\n\n{item['tests']}\nprint({passed!r})\n"
    outcome = sandbox.run(program, seconds=item.get("seconds", 5.0))
    return float(outcome.code == 0 and outcome.output.endswith(passed + "\n"))


def form(item: Item, response: str) -> float:
    """1 if the response matches the item's `pattern`, a regular expression, as a whole, else 0."""
    return float(re.fullmatch(item["pattern"], response.strip(), re.DOTALL) is not None)


def brevity(item: Item, response: str) -> float:
    """1 up to the item's `most_characters`, then falling to 0 at twice as many."""
    most = item["most_characters"]
    return max(0.0, min(1.0, 2.0 - len(response) / most))


REWARDS: dict[str, Reward] = {"task": task, "maths": maths, "code": code, "form": form, "brevity": brevity}


def combine(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """c1 r1 + c2 r2 + ...: the paper's mixture of helpful, safety and rule rewards (section 4.2).

    Raises ValueError for unlike numbers of rewards and weights.
    """
    check(len(rewards) == len(weights) > 0, f"{len(rewards)} rewards need as many weights, not {len(weights)}")

    def reward(item: Item, response: str) -> float:
        return sum(c * r(item, response) for c, r in zip(weights, rewards, strict=True))

    return reward
