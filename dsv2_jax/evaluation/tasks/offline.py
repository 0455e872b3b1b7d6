"""The functions that the offline task files name: their data set, and HumanEval's score by the sandbox."""

import ast
from typing import Any

import datasets

from dsv2_jax import sandbox
from dsv2_jax.evaluation.tasks import sets


def dataset(*, name: str, **_: Any) -> datasets.DatasetDict:
    """The data set of `SETS` that a task file names in `dataset_kwargs`; lm-eval adds the task's metadata."""
    return sets.load(name)


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if prompt and answer together solve the problem's tests in the sandbox, else 0.

    The tests define the prompt's complete helper functions again, so that an answer cannot replace them.
    """
    given = ast.parse(f"{doc['prompt']}\n    pass")  # a body for the function that the answer completes
    given.body = [part for part in given.body if getattr(part, "name", None) != doc["entry_point"]]
    tests = f"{ast.unparse(given)}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass_at_1": float(sandbox.solves(doc["prompt"] + results[0], tests, seconds=10.0))}
