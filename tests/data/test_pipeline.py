"""Batches: epochs, exact resumption, shares of processes, and evaluation in full."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from configs import pretrain
from dsv2_jax.config import Batch, Data
from dsv2_jax.data import corpora, pipeline, tokenizer

ROWS, LENGTH = 4, 24
NAMES = ("tokens_BT", "targets_BT", "weights_BT")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    random = np.random.default_rng(0)
    words = ["alpha", "beta ", "中文", "\n", "x = 1", "  ", "🙂", "return"]
    with (folder / "source.jsonl").open("w") as file:
        for number in range(60):
            text = f"{number}:" + "".join(random.choice(words, random.integers(1, 90)))
            file.write(json.dumps({"text": text}) + "\n")
    data = Data(source=str(folder / "source.jsonl"), held_out_fraction=0.2, folder=folder / "data")
    corpus = corpora.prepare(data)
    base = pretrain.tiny()
    config = dataclasses.replace(base, seed=3, data=data, batch=Batch(size=8, micro_size=ROWS, length=LENGTH))
    return config, corpus, tokenizer.for_config(data, 400, corpus)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


def _pairs(batches):
    return [
        (int(token), int(target))
        for batch in batches
        for row in range(len(batch["tokens_BT"]))
        for token, target, weight in zip(*(batch[n][row] for n in NAMES), strict=True)
        if weight
    ]


def test_every_epoch_reads_every_pair_once_in_another_order(setup):
    config, corpus, tok = setup
    config = dataclasses.replace(config, batch=Batch(size=1, length=LENGTH))  # so that epochs end between batches
    documents = [[tok.bos_id, *tok.encode(e["text"].decode()), tok.eos_id] for e in corpus.train]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    rows = -(-len(expected) // LENGTH)
    iterator = pipeline.train_batches(config, corpus, tok)
    epochs = [_pairs(_take(iterator, rows)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_neighbouring_rows_of_a_document_are_scattered(setup):
    config, corpus, tok = setup
    batches = _take(pipeline.train_batches(config, corpus, tok), 20)
    continued = sum(
        int(
            before["tokens_BT"][row, -1] != tok.eos_id and (before["targets_BT"][row, -1] == after["tokens_BT"][row, 0])
        )
        for before, after in itertools.pairwise(batches)
        for row in range(ROWS)
    )
    assert continued < 20, "a row continues the row before it only by chance"


def test_the_seed_alone_decides_the_order(setup):
    config, corpus, tok = setup
    first = _take(pipeline.train_batches(config, corpus, tok), 30)
    _same(first, _take(pipeline.train_batches(config, corpus, tok), 30))
    other = _take(pipeline.train_batches(dataclasses.replace(config, seed=4), corpus, tok), 30)
    assert any((a["tokens_BT"] != b["tokens_BT"]).any() for a, b in zip(first, other, strict=True))


def test_resumes_exactly_from_every_point(setup):
    config, corpus, tok = setup
    iterator, states, batches = pipeline.train_batches(config, corpus, tok), [], []
    for _ in range(120):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for number in range(0, 100, 7):
        resumed = pipeline.train_batches(config, corpus, tok)
        _take(resumed, number % 3)  # whatever was read before is forgotten
        resumed.set_state(json.loads(states[number]))
        _same(_take(resumed, 120 - number), batches[number:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batch(setup, processes):
    config, corpus, tok = setup
    whole = _take(pipeline.train_batches(config, corpus, tok), 20)
    rows = np.arange(ROWS).reshape(processes, -1)
    parts = [pipeline.train_batches(config, corpus, tok, mine=mine) for mine in rows]
    together = [_take(part, 20) for part in parts]
    joined = [{name: np.concatenate([part[i][name] for part in together]) for name in whole[i]} for i in range(20)]
    _same(joined, whole)
    state = parts[0].get_state()
    assert all(part.get_state() == state for part in parts)
    single, expected = pipeline.train_batches(config, corpus, tok), pipeline.train_batches(config, corpus, tok)
    single.set_state(state)
    _same(_take(single, 10), _take(expected, 30)[20:])


def test_a_batch_without_micro_batches_has_all_rows(setup):
    config, corpus, tok = setup
    config = dataclasses.replace(config, batch=Batch(size=6, length=10))
    assert next(pipeline.train_batches(config, corpus, tok))["tokens_BT"].shape == (6, 10)


def test_mistakes_are_named(setup):
    config, corpus, tok = setup
    state = pipeline.train_batches(config, corpus, tok).get_state()
    other = pipeline.train_batches(dataclasses.replace(config, seed=9), corpus, tok)
    with pytest.raises(ValueError, match="is for seed 3, and this run has 9"):
        other.set_state(state)


def test_held_out_rows_are_all_read_and_padded(setup):
    config, corpus, tok = setup
    batches = list(pipeline.held_out_batches(config, corpus, tok, rows=3, length=17))
    _same(batches, list(pipeline.held_out_batches(config, corpus, tok, rows=3, length=17)))
    documents = [[tok.bos_id, *tok.encode(e["text"].decode()), tok.eos_id] for e in corpus.held_out]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    real = [batch["weights_BT"] == 1 for batch in batches]
    found = [
        pair
        for batch, mask in zip(batches, real, strict=True)
        for pair in zip(batch["tokens_BT"][mask], batch["targets_BT"][mask], strict=True)
    ]
    assert found == expected
    assert len(batches) == -(-len(expected) // (3 * 17))
    assert all(batch["tokens_BT"].shape == (3, 17) for batch in batches)
    assert (batches[-1]["segments_BT"][~real[-1]] == 0).all()
    size = sum(tok.bytes_per_token[b["targets_BT"]][m].sum() for b, m in zip(batches, real, strict=True))
    assert size == sum(len(example["text"]) for example in corpus.held_out)
    assert next(pipeline.held_out_batches(config, corpus, tok, rows=2))["tokens_BT"].shape == (2, LENGTH)


def test_a_limited_evaluation_takes_rows_from_everywhere(setup):
    config, corpus, tok = setup
    whole = list(pipeline.held_out_batches(config, corpus, tok, rows=1, length=8))
    batches = list(pipeline.held_out_batches(config, corpus, tok, rows=4, length=8, limit=2))
    assert len(batches) == 2
    for number in range(8):
        expected = whole[number * len(whole) // 8]
        assert (batches[number // 4]["tokens_BT"][number % 4] == expected["tokens_BT"][0]).all()


def test_batches_of_any_text(setup):
    _, _, tok = setup
    texts = ["one", "", "two 中文\n" * 20]
    batches = list(pipeline.batches_of_text(iter(texts), tok, rows=2, length=8))
    pairs = sum(int(batch["weights_BT"].sum()) for batch in batches)
    assert pairs == sum(len(tok.encode(text)) + 1 for text in texts)
    assert list(pipeline.batches_of_text([], tok, rows=2, length=8)) == []
