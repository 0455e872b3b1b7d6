"""The paper's benchmarks and the report; needles; task files against sets that are written here."""

import json
import re

import numpy as np
import pytest
from lm_eval.tasks import get_task_dict
from tiny import give_tokenizer

from dsv2_jax.data import tokenizer
from dsv2_jax.evaluation import benchmarks, needle, report, suite
from dsv2_jax.evaluation.needle import Needle
from dsv2_jax.evaluation.suite import GROUPS, Row
from dsv2_jax.evaluation.tasks import offline, sets


@pytest.fixture(scope="module")
def known():
    return benchmarks.manager()


def test_every_benchmark_has_a_task_that_lm_eval_knows_or_a_reason(known):
    for group in GROUPS.values():
        for b in group:
            assert b.task or b.missing, b.name
            assert not b.task or b.task in known.task_index, b.name
            assert not b.offline or b.offline in known.task_index, b.name


def test_the_offline_group_is_of_all_task_files(known):
    files = {path.stem: path.read_text(encoding="utf-8") for path in benchmarks.TASKS.glob("*.yaml")}
    assert sorted(re.findall(r"- offline_(\w+)", files.pop("group"))) == sorted(files) == sorted(sets.SETS)
    for name, text in files.items():
        assert f"task: offline_{name}\n" in text and f"dataset_kwargs: {{name: {name}}}\n" in text
        assert f"offline_{name}" in known.all_tasks


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean offline_mmlu"):
        benchmarks.check_names(suite.rows("offline_mmul", offline=False, shots=None))


def test_the_same_examples_stand_before_each_question(known, tmp_path, monkeypatch):
    """So that an engine which shares beginnings computes them once."""
    lines = [{"question": f"How much is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(60)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(sets, "examples", lambda _: tmp_path / "set.jsonl")
    task = get_task_dict(["offline_gsm8k_100"], known)["offline_gsm8k_100"]
    task.build_all_requests(limit=4)
    contexts = [instance.args[0] for instance in task.instances]
    shared = contexts[0].rpartition("Question:")[0]
    assert shared.count("####") == 8 and len(set(contexts)) == 4 and all(c.startswith(shared) for c in contexts)
    for path in benchmarks.TASKS.glob("*.yaml"):
        text = path.read_text()
        assert ("sampler: first_n" in text) == bool(re.search(r"^num_fewshot: [1-9]", text, re.MULTILINE)), path.name


def test_groups_ask_with_the_papers_shots():
    rows = {r.benchmark.name: r for r in suite.rows("deepseek_v2_base", offline=True, shots=None) if r.benchmark}
    assert (rows["MMLU"].task, rows["MMLU"].shots, rows["MMLU"].missing) == ("offline_mmlu", 5, "")
    assert (rows["GSM8K"].task, rows["GSM8K"].shots) == ("offline_gsm8k_100", 8)
    assert "network" in rows["DROP"].missing
    online = {r.benchmark.name: r for r in suite.rows("deepseek_v2_base", offline=False, shots=1) if r.benchmark}
    assert (online["ARC-Easy"].task, online["ARC-Easy"].shots, online["DROP"].missing) == ("arc_easy", 1, "")
    assert online["HumanEval"].task == "offline_human_eval"


def test_in_a_log_a_remark_stands_in_its_line(capsys):
    row = next(r for r in suite.rows("deepseek_v2_base", offline=True, shots=None) if r.missing)
    report.show([report.Score(row=row, note=f"not available: {row.missing}")])
    assert f"not available: {row.missing}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_the_page_shows_the_papers_columns_beside_ours(tmp_path, suffix):
    row = next(r for r in suite.rows("deepseek_v2_base", offline=True, shots=None) if r.task == "offline_mmlu")
    one = report.score(row, {"sample_len": 100, "acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "x"}, 100, 5)
    assert (one.metric, one.value, one.error) == ("acc", 0.25, 0.01)
    none = report.Score(row=Row(task="", benchmark=GROUPS["deepseek_v2_base"][3]), note="not available: <why>")
    report.write_page(tmp_path / f"page{suffix}", "run", [one, none], {"bits_per_byte": 2.25})
    text = (tmp_path / f"page{suffix}").read_text()
    for shown in ("MMLU", "25.0", "71.3", "78.5", "58.3", "DROP", "80.1", "2.25", "67B"):
        assert shown in text
    assert ("&lt;why&gt;" in text) == (suffix == ".html")
    assert json.dumps(report.as_json([one, none]))


def test_choices_and_sums_are_read_from_the_packages_lines():
    raw = json.dumps({"question": "q", "options": "\nA. one\nB. two", "answer": "B. two"}).encode()
    wanted = [{"question": "q", "choices": ["one", "two"], "label": 1}]
    assert list(sets.SETS["commonsenseqa"].read(raw)) == wanted
    raw = json.dumps({"prompt": "p", "expected": "18", "upstream_answer": "5*2=<<5*2=10>>10\n#### 18"}).encode()
    assert next(iter(sets.SETS["gsm8k_100"].read(raw)))["answer"] == "5*2=10\n#### 18"


def test_a_program_passes_only_with_the_right_answer():
    problem = {
        "prompt": "def double(x):\n",
        "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
        "entry_point": "double",
    }
    assert offline.pass_at_1(problem, ["    return 2 * x\n"]) == {"pass_at_1": 1.0}
    assert offline.pass_at_1(problem, ["    return x * x\n"]) == {"pass_at_1": 0.0}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    run = tmp_path_factory.mktemp("words")
    give_tokenizer(run)
    return tokenizer.load(run / "tokenizer")


def test_needles_are_at_their_depths(words):
    wanted = Needle(lengths=(300, 600), depths=3, needles=2, repeats=2)
    found = needle.haystacks(words, ["Some text of many words. " * 20, "Another one.\n" * 30], wanted)
    assert len(found) == 2 * 3 * 2 * 2 * 2  # lengths, depths, languages, repeats, questions
    assert found == needle.haystacks(words, ["Some text of many words. " * 20, "Another one.\n" * 30], wanted)
    for number, one in enumerate(found):
        text = words.decode(one.ids[1:])
        assert one.ids[0] == words.bos_id
        assert one.length - 40 < len(one.ids) <= one.length
        secret = " " + one.word + (".\n" if one.language == "english" else "。\n")
        assert text.count(secret) == 1 and not text.endswith(one.word)  # the question does not contain it either
        if number % 2 == 0:  # the first needle is at the depth, up to the length of the other one
            assert abs(text.index(secret) / len(text) - one.depth) < 0.35


def test_an_answer_ends_with_its_word():
    assert needle.is_answered(" sun.", "sun")
    assert not needle.is_answered(" sunday", "sun")
    assert not needle.is_answered(" is sun", "sun")
    assert needle.is_answered(" 龙\n", "龙") and not needle.is_answered(" 龙虎", "龙")


def test_shares_by_length_and_depth(tmp_path):
    wanted = Needle(lengths=(10, 20), depths=2, languages=("english",), repeats=1)
    asked = [needle.Haystack((0,), "sun", n, d, "english") for n in (10, 20) for d in (0.0, 1.0)]
    figures = needle.summary(asked, np.array([True, True, False, True]), wanted)
    assert figures["grid"] == [[1.0, 1.0], [0.0, 1.0]]
    assert figures["by_length"] == {10: 1.0, 20: 0.5}
    assert figures["exact_match"] == 0.75
    needle.draw_picture(figures, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
