"""Rewards against answers whose worth is plain."""

import pytest

from dsv2_jax.alignment import verifiers
from dsv2_jax.data import instructions


@pytest.mark.parametrize("name", instructions.TASKS)
def test_every_built_in_task_scores_its_own_answers_and_no_others(name):
    for item in instructions.questions(name, 5, seed=3):
        item = {**item, "task": name}
        assert verifiers.task(item, f" {item['answer']}\n") == 1
        assert verifiers.task(item, "I do not know") < 0.5


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("42", r"So it is \boxed{42}.", 1),
        (r"$\frac{1}{2}$", "The result is 0.5", 1),
        ("x^2 + 2x + 1", r"$(x+1)^2$", 1),
        ("42", r"\boxed{41}", 0),
        ("7", "I cannot say", 0),
        ("7", "", 0),
    ],
)
def test_maths(answer, response, reward):
    item = {"answer": f"${answer.strip('$')}$"}
    assert verifiers.maths(item, response) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("def add(a, b):\n    return a + b", 1),
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
        ("def add(a, b):\n    return a - b", 0),
        ("def add(a, b) return", 0),
        ("import sys\nprint('all tests passed')\nsys.exit(0)", 0.0),
        ("import os\nprint('all tests passed', flush=True)\nos._exit(0)", 0.0),
        ("", 0),
    ],
)
def test_code(response, reward):
    item = {"tests": "assert add(2, 2) == 4\nassert add(-1, 1) == 0"}
    assert verifiers.code(item, response) == reward


def test_form_brevity_and_their_mixture():
    item = {"pattern": r"<think>.*</think>\s*\d+", "most_characters": 20}
    assert verifiers.form(item, "<think>a\nb</think> 7") == 1 and verifiers.form(item, "7") == 0
    assert [verifiers.brevity(item, "x" * n) for n in (0, 20, 30, 40, 90)] == [1, 1, 0.5, 0, 0]
    mixed = verifiers.combine([verifiers.form, verifiers.brevity], [0.7, 0.3])
    assert mixed(item, "x" * 30) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="2 rewards need as many weights, not 1"):
        verifiers.combine([verifiers.form, verifiers.brevity], [1.0])
