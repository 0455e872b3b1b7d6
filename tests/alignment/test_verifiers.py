"""Rewards against answers whose worth is plain."""

import concurrent.futures
import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from dsv2_jax.alignment import samples, verifiers
from dsv2_jax.config import Config
from dsv2_jax.data import instructions

FENCES = ("```py", "```Python", "```python3", "```PY", "``` python", "```python  ", "```", "``` ")
READS_CONSTANTS = """
import os, sys
for value in sys._getframe().f_code.co_consts:
    if isinstance(value, str) and len(value) == 64: print(value, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", instructions.TASKS)
def test_every_built_in_task_scores_its_own_answers_and_no_others(name):
    for item in instructions.questions(name, 5, seed=3):
        item = {**item, "task": name}
        assert verifiers.task(item, f" {item['answer']}\n") == 1
        assert verifiers.task(item, "I do not know") < 0.5


EVALUATING = [
    "spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "countdown", "puzzle24", "simple_integration",
    "intermediate_integration", "polynomial_multiplication", "number_sorting", "bitwise_arithmetic",
]  # fmt: skip


@pytest.mark.parametrize("name", EVALUATING)
def test_a_task_whose_score_runs_the_response_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (item,) = reasoning_gym.create_dataset(name, size=1, seed=1)
    with pytest.raises(ValueError, match="refused"):
        verifiers.task({**item, "task": name}, "__import__('os').mkdir('run')")
    assert list(tmp_path.iterdir()) == []


def test_every_allowed_task_scores_hostile_answers_without_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    allowed = [name for name in DATASETS if verifiers._is_safe(name)]
    assert len(allowed) == 55 and set(instructions.TASKS) <= set(allowed) and not set(EVALUATING) & set(allowed)
    hostile = [
        "",
        "__import__('os').mkdir('run')",
        "9" * 5000,
        "-1e999999999",
        "1/0",
        "nan",
        "[" * 5000,
        "\ud800\0",
        ",=:" * 999,
    ]
    for name in allowed:
        (item,) = reasoning_gym.create_dataset(name, size=1, seed=1)
        start = time.process_time()
        scores = [verifiers.task({**item, "task": name}, answer) for answer in hostile]
        assert all(0 <= score < 1 for score in scores), name
        assert time.process_time() - start < 5, name
    assert list(tmp_path.iterdir()) == []


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


def test_maths_has_limits_and_serves_threads():
    """Several numbers too large to be had, among others that are not, from more threads than cores."""
    item = {"answer": "$42$"}
    responses = [f"\\boxed{{{n}}}" for n in range(40, 45)] * 4 + [r"$9^{9^{9^{9}}}$", "x" * 10**6 + " 42"]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rewards = list(pool.map(lambda response: verifiers.maths(item, response), responses))
    assert rewards == [0, 0, 1, 0, 0] * 4 + [0, 1]
    assert time.monotonic() - start < 60


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
        *((f"So:{fence}\ndef add(a, b):\n    return a + b\n```\nDone.", 1) for fence in FENCES),
        ("```py\r\ndef add(a, b):\r\n    return a + b\r\n```\r\n", 1),
        ("```python\ndef add(a, b): return a + b\n```\n```bash\npython add.py\n```\nThe output:\n", 1),
        ("```python\ndef add(a, b): return a + b\n", 1),
        ("```python\ndef add(a, b): return a + b\n```\n```\ndef add(a, b): return a - b\n```", 0),
        (READS_CONSTANTS, 0),
    ],
)
def test_code(response, reward):
    item = {"tests": "assert add(2, 2) == 4\nassert add(-1, 1) == 0"}
    assert verifiers.code(item, response) == reward


def test_the_documentation_lists_every_reward():
    text = (Path(__file__).parents[2] / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    rows = re.search(r"\| reward \|.*?\n\n", text, re.DOTALL)
    assert rows and re.findall(r"^\| `(\w+)` \|", rows[0], re.MULTILINE) == list(verifiers.REWARDS)


def test_form_and_brevity():
    item = {"pattern": r"<think>.*</think>\s*\d+", "most_characters": 20}
    assert verifiers.form(item, "<think>a\nb</think> 7") == 1 and verifiers.form(item, "7") == 0
    assert [verifiers.brevity(item, "x" * n) for n in (0, 20, 30, 40, 90)] == [1, 1, 0.5, 0, 0]
    assert verifiers.form({"pattern": "(a|a)*b"}, "a" * 40) == 0  # takes 2^40 steps
    assert verifiers.form(item, "<think></think> 8") == 1


@pytest.mark.parametrize(
    ("rewards", "item", "message"),
    [
        (("task",), {"answer": "1"}, r"prompts.jsonl:7: the reward task needs 'task', a text"),
        (("task",), {"task": "countdown", "answer": "1"}, r"prompts.jsonl:7: task 'countdown' .* refused"),
        (("task",), {"task": "chain_sums", "answer": "1"}, r"task 'chain_sums' is no task of reasoning-gym"),
        (("maths",), {"answer": 4}, r"the reward maths needs 'answer', a text"),
        (("code",), {"tests": "assert f(1) =="}, r"tests 'assert f\(1\) ==' is no Python"),
        (("code",), {"tests": "", "seconds": 10**9}, r"seconds 1000000000 is not in 0 to 60"),
        (("form",), {"pattern": "("}, r"pattern '\(' is no regular expression"),
        (("brevity",), {"most_characters": 0}, r"most_characters 0 is not positive"),
    ],
)
def test_an_item_that_a_reward_cannot_judge_is_refused_when_it_is_read(rewards, item, message):
    config = Config(workdir=Path("unused"))
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, rewards=rewards))
    line = {"text": json.dumps({"prompt": "?", **item}).encode(), "name": b"prompts.jsonl:7"}
    corpus = SimpleNamespace(train=[line], held_out=[line], digest="")
    with pytest.raises(ValueError, match=message):
        samples.Prompts(config, corpus, None)  # pyright: ignore[reportArgumentType]
