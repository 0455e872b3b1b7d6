"""The long-context stage: its first parameters, its data and the RoPE settings in its checkpoint."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from tiny import lite, make_run

from configs.extend import extended
from dsv2_jax import hf, loading
from dsv2_jax.config import Batch, Config, Data
from dsv2_jax.data import corpora, packing, pipeline, retrieval, tokenizer
from dsv2_jax.training import checkpoint


def test_a_checkpoint_without_yarn_takes_the_presets_rope(tmp_path):
    """The same parameters, the new rope, also in the run's config and in its export."""
    short = dataclasses.replace(
        lite(), max_position_embeddings=128, rope=dataclasses.replace(lite().rope, original_max_position_embeddings=128)
    )
    params = make_run(tmp_path / "short", short)
    long = extended(short, 40.0, 4096)
    assert (long.rope.factor, long.rope.original_max_position_embeddings) == (40.0, 128)
    config = Config(
        workdir=tmp_path / "long", init=tmp_path / "short", model=long, batch=Batch(size=4, length=1024), tokens=10**6
    )
    found = loading.params_for(config, None)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    checkpoint.save_params(config.workdir, config, found, step=1)
    assert loading.load(config.workdir).model == long
    hf.export(config.workdir, tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 40
    assert written["rope_scaling"]["original_max_position_embeddings"] == 128
    assert written["max_position_embeddings"] == 4096


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = [
        "The secret word of Paris is gold.\nQuestion: What is the answer? " * 20,
        "长安的暗号是。问：为何？答" * 20,
    ]
    return tokenizer.train(texts, 384, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def hay(words):
    texts = ["A long text without any figure. " * 40, "Another one, of other words.\n" * 30]
    return np.concatenate([packing.document_ids(words, text) for text in texts])


FACTS = (r"\nThe secret word of (\w+) is (\w+)\.\n", r"\n(\w+)的暗号是 (\w)。\n")
ASKED = (
    r"\nQuestion: What is the secret word of (\w+)\?\nAnswer: The secret word of \1 is (\w+)\n",
    r"\n问：(\w+)的暗号为何？\n答：\1的暗号是 (\w)\n",
)


def test_retrieval_rows_hold_the_answer_to_their_question(words, hay):
    """Whole documents, read back as text; only answers have the weight, and each answers a fact above it."""
    rows = retrieval.RetrievalRows(hay, words, 1500, count=6, weight=5.0)
    batch = rows.batch(range(6))
    again = retrieval.RetrievalRows(hay, words, 1500, count=9, weight=5.0).batch(range(6))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    languages = set()
    assert batch["segments_BT"].max() > 2
    for row in range(6):
        segments = batch["segments_BT"][row]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            tokens, targets = batch["tokens_BT"][row][here], batch["targets_BT"][row][here]
            assert tokens[0] == words.bos_id
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert not {words.bos_id, words.eos_id} & set(targets.tolist())
            np.testing.assert_array_equal(batch["positions_BT"][row][here], np.arange(here.sum()))
            text = words.decode(targets)
            facts = [fact for wording in FACTS for fact in re.findall(wording, text)]
            asked = [answer for wording in ASKED for answer in re.findall(wording, text)]
            assert len(facts) == 1 and facts == asked
            weights = batch["weights_BT"][row][here]
            assert set(weights.tolist()) == {1.0, 5.0}
            assert words.decode(targets[weights == 5]) == "".join(f" {word}\n" for _, word in asked)
            languages.add(facts[0][0].isascii())
    assert languages == {True, False}
    assert (batch["weights_BT"][batch["segments_BT"] == 0] == 0).all()


def test_retrieval_rows_are_their_share_of_training_rows_only(words, tmp_path):
    (tmp_path / "text.txt").write_text("A text to train on, and some more.\n" * 400)
    data = Data(source=str(tmp_path / "text.txt"), folder=tmp_path, retrieval_share=0.25, retrieval_weight=7.0)
    corpus = corpora.prepare(data)
    config = Config(workdir=tmp_path / "run", data=data, batch=Batch(size=4, length=256))
    plain = dataclasses.replace(config, data=dataclasses.replace(data, retrieval_share=0.0))
    text = pipeline.packed_rows(plain, corpus, "train", words, 256)
    mixed = pipeline.packed_rows(config, corpus, "train", words, 256)
    assert len(mixed) == math.ceil(len(text) / 0.75)
    batch = mixed.batch(range(len(mixed)))
    np.testing.assert_array_equal(batch["tokens_BT"][: len(text)], text.batch(range(len(text)))["tokens_BT"])
    asks = (batch["weights_BT"] == 7).any(axis=1)
    assert not asks[: len(text)].any() and asks[len(text) :].all()
    held_out = pipeline.packed_rows(config, corpus, "held_out", words, 256)
    assert held_out.batch(range(len(held_out)))["weights_BT"].max() == 1


def test_retrieval_rows_that_cannot_be_are_refused(words, hay):
    with pytest.raises(ValueError, match=r"retrieval_share is for data\.form text"):
        Data(form="conversations", retrieval_share=0.5)
    with pytest.raises(ValueError, match="retrieval_share must be at least 0 and below 1"):
        Data(retrieval_share=1.0)
    with pytest.raises(ValueError, match="a row of 20 tokens"):
        retrieval.RetrievalRows(hay, words, 20, count=1, weight=1.0)
