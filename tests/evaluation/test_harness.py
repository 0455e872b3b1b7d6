"""The harness against lm-eval's own `hf` backend, on the same exported checkpoint."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import lm_eval
import numpy as np
import pytest
from hf_cases import give_tokenizer, lite, make_run
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dsv2_jax import loading
from dsv2_jax.data import chat
from dsv2_jax.evaluation.harness import Harness, UnfitError
from dsv2_jax.hf import export
from dsv2_jax.inference.engine import Capacity

WORDS = ("the", "model", "reads", "a", "line", "says", "what", "import", "self", "return", "天下大势", "分久必合")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported checkpoint with a tokenizer of 512 ids and 1024 positions."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out") / "hf"
    make_run(run, dataclasses.replace(lite(), vocab_size=512, max_position_embeddings=192))
    give_tokenizer(run)
    export(run, out)
    return out


@pytest.fixture(scope="module")
def ours(folder):
    return Harness(loading.load(folder), capacity=Capacity(rows=8, length=192, chunk=64, page=16))


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32")


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]  # type: ignore


def test_scores_are_those_of_transformers(ours, theirs):
    """Spaces at the border, no context, Chinese, special ids named in the text, and contexts far too long."""
    rng = np.random.default_rng(0)
    shared = text(rng, 20)
    pairs = [(text(rng, n), " " + text(rng, 3)) for n in (1, 5, 17, 90, 300)]
    pairs += [(shared, f" {c}") for c in "ABCD"]
    pairs += [("ends with spaces  ", "word"), ("", " no context"), ("天下", "大势"), (ours._bos + "named", " begin")]
    pairs += [("x", " " + text(rng, 40))]
    wanted = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], atol=1e-3, rtol=0)
    assert [b for _, b in found] == [b for _, b in wanted]


def test_rolling_scores_are_those_of_transformers(ours, theirs):
    rng = np.random.default_rng(1)
    texts = [(text(rng, n),) for n in (1, 30, 200, 500)]
    wanted = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)


def test_answers_are_those_of_transformers(ours, theirs):
    """Stop strings that do come, contexts too long for what is to be said, and the default number of new tokens."""
    rng = np.random.default_rng(2)
    contexts = [text(rng, n) for n in (1, 4, 60, 300)]
    free = [(c, {"until": [], "max_gen_toks": 24}) for c in contexts]
    answers = ours.generate_until(instances("generate_until", free), disable_tqdm=True)
    stops = [[a[5:7], a[12:13]] if len(a) > 13 else ["\n"] for a in answers]
    asked = free + [(c, {"until": s, "max_gen_toks": 24}) for c, s in zip(contexts, stops, strict=True)]
    wanted = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    found = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found == wanted
    assert any(len(b) < len(a) for a, b in zip(found[:4], found[4:], strict=True))  # some did stop


def test_conversations_are_written_as_transformers_does(ours, theirs):
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3 + 3?"},
    ]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    written = ours.apply_chat_template(history)
    assert ours.tok_encode(written) == theirs.tok_encode(written)


def test_conversations_are_written_by_any_template_of_a_checkpoint(ours, theirs, monkeypatch):
    """What templates know from transformers: errors, the time, JSON, blocks that are marked, loops that end."""
    template = (
        "{%- for m in messages %}\n  {%- if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
        "{% endif %}{% generation %}<{{ m | tojson }}>{% endgeneration %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "\n{% endfor %}{{ strftime_now('%Y') }}{{ eos_token }}"
    )
    tokenizer = dataclasses.replace(ours._tokenizer, template=chat.Template(template, {"eos_token": ours._eos}))
    monkeypatch.setattr(ours, "_tokenizer", tokenizer)
    monkeypatch.setattr(theirs.tokenizer, "chat_template", template)
    history = [{"role": "user", "content": f"<{n}> &"} for n in range(3)]
    assert ours.chat_template(True) == template
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    with pytest.raises(ValueError, match="refuses these messages: no system"):
        ours.apply_chat_template([{"role": "system", "content": "x"}])


def test_what_the_engine_does_not_know_is_refused(ours):
    with pytest.raises(UnfitError, match="num_beams"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 3, "max_gen_toks": 4})]))
    with pytest.raises(UnfitError, match="192 positions"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 500})]))


KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
num_fewshot: 2
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
num_fewshot: 1
generation_kwargs: {until: ["\\n", "line"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> None:
    rng = np.random.default_rng(3)
    documents = [
        {"context": text(rng, int(rng.integers(3, 60))), "choices": [text(rng, 2) for _ in range(4)], "label": i % 4}
        for i in range(24)
    ]
    for name, shown in (("train", documents[:6]), ("test", documents[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in shown))
    for name, words in KINDS.items():
        files = f'dataset_path: json\ndataset_kwargs: {{data_files: {{train: "{folder}/train.jsonl", '
        files += f'test: "{folder}/test.jsonl"}}}}\nfewshot_split: train\ntest_split: test\n'
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{files}{words}")


@pytest.mark.slow
def test_four_kinds_of_tasks_score_as_lm_evals_own_backend(ours, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    tasks = [f"own_{name}" for name in KINDS]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results, seconds = [], []
    for model in (ours, theirs, ours):  # the first time, programs are compiled
        start = time.perf_counter()
        results.append(lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0))
        seconds.append(time.perf_counter() - start)
    _, wanted, found = results
    assert wanted and found
    for task in tasks:
        for a, b in zip(found["samples"][task], wanted["samples"][task], strict=True):
            assert a["doc_id"] == b["doc_id"]
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(y, str):
                    assert x == y
                else:
                    np.testing.assert_allclose(np.float64(x), np.float64(y), atol=1e-3, rtol=0)
        scores = [{k: v for k, v in r["results"][task].items() if isinstance(v, float)} for r in (found, wanted)]
        assert scores[0].keys() == scores[1].keys()
        for name, value in scores[1].items():
            assert scores[0][name] == pytest.approx(value, rel=1e-4, abs=1e-9), (task, name)
    print(f"seconds: hf {seconds[1]:.2f}, ours compiled {seconds[2]:.2f}, with {jax.__version__}")
