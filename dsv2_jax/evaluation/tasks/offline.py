"""The functions that the offline task files name: one data set each, and HumanEval's score by the sandbox."""

import ast
from typing import Any

from dsv2_jax import sandbox
from dsv2_jax.evaluation.tasks import sets

mmlu = sets.load("mmlu")
piqa = sets.load("piqa")
openbookqa = sets.load("openbookqa")
commonsenseqa = sets.load("commonsenseqa")
boolq = sets.load("boolq")
gsm8k_100 = sets.load("gsm8k_100")
hellaswag_100 = sets.load("hellaswag_100")
truthfulqa_100 = sets.load("truthfulqa_100")
human_eval = sets.load("human_eval")
chengyu_meaning = sets.load("chengyu_meaning")
chengyu_cloze = sets.load("chengyu_cloze")


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if prompt and answer together solve the problem's tests in the sandbox, else 0.

    The tests define the prompt's complete helper functions again, so that an answer cannot replace them.
    """
    given = ast.parse(f"{doc['prompt']}\n    pass")  # a body for the function that the answer completes
    given.body = [part for part in given.body if getattr(part, "name", None) != doc["entry_point"]]
    tests = f"{ast.unparse(given)}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass_at_1": float(sandbox.solves(doc["prompt"] + results[0], tests, seconds=10.0))}
