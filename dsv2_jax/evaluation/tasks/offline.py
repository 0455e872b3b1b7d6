"""What the offline task files name: a data set each, and HumanEval's score by the sandbox."""

import ast
from typing import Any

from dsv2_jax.alignment import verifiers
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


def passes(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """pass@1: 1 if prompt and answer, run in the sandbox, pass the problem's tests.

    Functions that the prompt gives in full are the tests' own too, so that an answer cannot replace them.
    """
    given = ast.parse(f"{doc['prompt']}\n    pass")  # whose last function has a body then
    given.body = [part for part in given.body if getattr(part, "name", None) != doc["entry_point"]]
    tests = f"{ast.unparse(given)}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass_at_1": verifiers.code({"tests": tests, "seconds": 10.0}, doc["prompt"] + results[0])}
