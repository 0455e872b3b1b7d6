"""The long-context stage: what it starts from, what it reads, and what its checkpoint says of itself."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from hf_cases import lite, make_run

from configs.extend import extended
from dsv2_jax import hf, loading
from dsv2_jax.config import Batch, Config, Data
from dsv2_jax.data import retrieval
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


def test_retrieval_documents_answer_what_they_ask():
    texts = ["A long text without any figure. " * 40, "Another one, of other words.\n" * 30]
    made = list(retrieval.documents(texts, 20, 900))
    assert made == list(retrieval.documents(texts, 20, 900))
    questions = 0
    for _, text in made:
        asked = re.findall(r"secret number of (\w+)\?\nAnswer: The secret number of \1 is (\d{4})\n", text)
        asked += re.findall(r"\n问：(\w+)的秘密数字是多少？\n答：\1的秘密数字是 (\d{4})\n", text)
        assert asked
        for place, number in asked:
            told = (f"\nThe secret number of {place} is {number}.\n", f"\n{place}的秘密数字是 {number}。\n")
            assert sum(text.count(sentence) for sentence in told) == 1
        questions += len(asked)
    assert questions > 20


def test_retrieval_documents_are_of_the_builtin_corpus_only():
    with pytest.raises(ValueError, match="built-in"):
        Data(source="my.txt", retrieval_documents=3)
