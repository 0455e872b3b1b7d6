"""The built-in questions: what one form of the data is evaluated on, no form learns; lines of the corpus as answers."""

import json
import re
from pathlib import Path

import pytest
import sympy

from dsv2_jax.config import Data
from dsv2_jax.data import corpora, instructions

TASKS = ("simple_equations", "chain_sum")


def asked(form, value):
    """The user's questions of a document."""
    if form == "conversations":
        return [m["content"] for m in value if m["role"] == "user"]
    return [value["prompt"]]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Questions by (form, split), as a run reads them."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for form in ("conversations", "prompts", "preferences"):
        corpus = corpora.prepare(Data(form=form, tasks=TASKS, folder=folder))
        for split in ("train", "held_out"):
            source = getattr(corpus, split)
            values = [json.loads(source[i]["text"]) for i in range(len(source))]
            found[form, split] = [question for value in values for question in asked(form, value)]
    return found


def test_nothing_is_learnt_that_anything_is_evaluated_on(splits):
    learnt = {q for (_, split), those in splits.items() if split == "train" for q in those}
    evaluated = {q for (_, split), those in splits.items() if split == "held_out" for q in those}
    assert learnt and evaluated and not learnt & evaluated
    every = len(learnt | evaluated)
    assert len(evaluated) / every == pytest.approx(1 / 8, rel=0.25)


def test_questions_of_evaluation_stand_once_and_answers_are_right(splits):
    for (_, split), those in splits.items():
        assert split == "train" or len(those) == len(set(those))
    assert set(splits["preferences", "held_out"]) <= set(splits["prompts", "held_out"])
    for made in instructions.make("conversations", ["simple_equations"], ()):
        question, answer = made.value[0]["content"], made.value[1]["content"]
        left, right = question.rpartition(":")[2].split("=")
        assert sympy.sympify(re.sub(r"[a-z]", f"({answer})", left)) == int(right), question


def test_an_equation_with_another_variable_is_the_same_question():
    asked = "Find the value of {} in the equation: {}*{} + 5 = 61"
    splits = [instructions.held_out(asked.format(x, n, x)) for n in (2, 4, 8) for x in "xyz"]
    assert splits[0:3] == splits[0:1] * 3 and splits[3:6] == splits[3:4] * 3 and splits[6:9] == splits[6:7] * 3


def test_lines_follow_each_other_in_what_pretraining_learns(tmp_path):
    data = Data(form="conversations", tasks=(instructions.NEXT_LINE,), folder=tmp_path, fetch=False)
    corpus = corpora.prepare(data)
    text = corpora.prepare(Data(folder=tmp_path, fetch=False))
    learnt = "\n".join(
        line.strip()
        for i in range(len(text.train))
        for line in text.train[i]["text"].decode().splitlines()
        if line.strip()
    )
    for source in (corpus.train, corpus.held_out):
        assert len(source) > 20
        for i in range(0, len(source), 50):
            user, assistant = json.loads(source[i]["text"])[:2]
            assert user["content"].removeprefix("Which line follows this one? ") + "\n" + assistant["content"] in learnt


def test_the_documentation_lists_every_task():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.search(r"\| task \|.*?\n\n", text, re.DOTALL)
    listed = [*instructions.TASKS, instructions.NEXT_LINE]
    assert rows and re.findall(r"^\| `(\w+)` \|", rows[0], re.MULTILINE) == listed


def test_a_task_without_a_verifier_gives_no_prompts():
    with pytest.raises(ValueError, match="no task 'next_line' for prompts"):
        corpora.prepare(Data(form="prompts", tasks=(instructions.NEXT_LINE,), folder=Path("unused")))
