"""Reward models: rows and loss worked out by hand, scores against transformers, accuracy on easy pairs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import random_params, rows_of, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from configs import pretrain
from dsv2_jax import hf, loading
from dsv2_jax import train as command
from dsv2_jax.alignment import reward
from dsv2_jax.alignment.judge import Judge
from dsv2_jax.config import Batch, Cadence, Compute, Data, Mesh, Optimizer
from dsv2_jax.data import chat, tokenizer
from dsv2_jax.data.preferences import Preference, PreferenceRows
from dsv2_jax.training import checkpoint, run_folder


def ids(*numbers):
    return np.array(numbers, np.int32)


ROWS = [
    Preference((ids(1, 2, 3), ids(1, 2, 4, 5)), 0.5),
    Preference((ids(6, 7),), 2.0),
    Preference((ids(*range(10)), ids(*range(4))), 0.0),  # too long for a row of 9
]


def test_rows_by_hand():
    rows = PreferenceRows(ROWS, 9)
    assert (len(rows), rows.too_long) == (1, 1)
    batch = rows.batch([0, -1])
    assert batch["tokens_BT"].tolist() == [[1, 2, 3, 1, 2, 4, 5, 6, 7], [0] * 9]
    assert batch["positions_BT"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 3, 3], [0] * 9]
    assert batch["ends_BT"][0].tolist() == [0, 0, 1, 0, 0, 0, -1, 0, 1]
    assert batch["pairs_BT"][0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert batch["values_BT"][0].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0, 2]
    assert batch["weights_BT"].sum() == 2


@pytest.fixture(scope="module")
def model():
    tiny = pretrain.tiny().model
    return dataclasses.replace(tiny, head="score", moe=dataclasses.replace(tiny.moe, budget_sequences=1))


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(jnp.asarray, random_params(model))


def test_scores_are_those_of_transformers(model, params, tmp_path):
    config = dataclasses.replace(
        pretrain.tiny(),
        workdir=tmp_path / "run",
        model=model,
        data=Data(form="preferences"),
        compute=Compute(dtype="float32"),
    )
    checkpoint.save_params(tmp_path / "run", config, params)
    hf.export(tmp_path / "run", tmp_path / "hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (3, 20))
    with torch.no_grad():
        want = torch.stack([theirs(torch.tensor(row)[None]).logits[0, 0] for row in tokens]).numpy()
    back = loading.load(tmp_path / "hf")
    assert back.model.head == "score"
    single = dataclasses.replace(config, mesh=Mesh(fsdp=1))
    scores = jax.jit(lambda given: reward.scores(given, rows_of(tokens), single)[0])
    for given in (params, back.params):
        got = scores(given)
        np.testing.assert_allclose(got[:, -1], want, atol=1e-5)


def test_transformers_scores_padded_batches_where_we_do(model, params, tmp_path):
    """Unequal lengths, padded by the exported tokenizer on either side; each answer ends with its end of sequence."""
    words = tokenizer.train(["User: say it\n\nAssistant: yes no perhaps " * 20], 330, tmp_path / "words")
    assert words.pad_id == words.eos_id  # as DeepSeek-V2's own has it
    model = dataclasses.replace(model, vocab_size=384)
    params = params | {"embed": jax.tree.map(jnp.asarray, random_params(model)["embed"])}
    config = dataclasses.replace(
        pretrain.tiny(), workdir=tmp_path / "run", model=model, data=Data(form="preferences"),
        batch=Batch(size=4, length=64), compute=Compute(dtype="float32", remat="none"), mesh=Mesh(fsdp=1),
    )  # fmt: skip
    checkpoint.save_params(tmp_path / "run", config, params)
    run_folder.keep_tokenizer(tmp_path / "run", words.save)
    hf.export(tmp_path / "run", tmp_path / "hf")
    talks = [
        [{"role": "user", "content": "say it " * n}, {"role": "assistant", "content": "yes"}] for n in (1, 5, 2, 7)
    ]
    ours = Judge(tmp_path / "run", config, words, None)([chat.encode(talk, words).ids.tolist() for talk in talks])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert theirs.config.pad_token_id not in (None, words.eos_id)
    for side in ("right", "left"):
        reader = AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side=side)
        assert reader.pad_token_id == theirs.config.pad_token_id
        batch = reader.apply_chat_template(talks, padding=True, return_dict=True, return_tensors="pt")
        assert len(set(batch["attention_mask"].sum(1).tolist())) == len(talks)
        with torch.no_grad():
            got = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
        np.testing.assert_allclose(got, ours, atol=1e-5)
    assert np.ptp(ours) > 1e-2


def test_loss_by_hand(model, params):
    moe = dataclasses.replace(model.moe, **dict.fromkeys(model.moe.balances(), 0.0))
    model = dataclasses.replace(model, moe=moe)
    config = dataclasses.replace(
        pretrain.tiny(), model=model, mesh=Mesh(fsdp=1), compute=Compute(dtype="float32", remat="none")
    )
    batch = {name: jnp.asarray(leaf) for name, leaf in PreferenceRows(ROWS, 9).batch([0, -1]).items()}
    scores = jax.jit(lambda p: reward.scores(p, batch, config)[0])(params)
    better, worse, alone = (float(scores[0, at]) for at in (2, 6, 8))
    total = jax.jit(lambda p: reward.loss(p, batch, config=config, exempt_B=None, total_weight=2.0, share=1.0))
    value, metrics = total(params)
    want = (np.log1p(np.exp(-(better - worse - 0.5))) + (alone - 2.0) ** 2) / 2
    assert value == pytest.approx(want, rel=1e-5)
    right = (better > worse) + (abs(alone - 2) < 0.5)
    assert float(metrics["accuracy"]) == pytest.approx(right / 2)
    assert float(metrics["tokens"]) == 2


@pytest.mark.slow
def test_a_reward_model_learns_separable_pairs(model, tmp_path):
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for n in range(160):
            file.write(json.dumps({"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}) + "\n")
    config = dataclasses.replace(
        pretrain.tiny(),
        workdir=tmp_path / "run",
        model=model,
        tokens=0,
        epochs=8,
        data=Data(
            source=str(tmp_path / "pairs.jsonl"), form="preferences", folder=tmp_path / "data", held_out_fraction=0.2
        ),
        batch=Batch(size=8, length=64),
        optimizer=Optimizer(peak_lr=5e-3, warmup_steps=2, decay_at=()),
        compute=Compute(dtype="float32", remat="none"),
        cadence=Cadence(log=1, evaluate=1000, save=1000),
        mesh=Mesh(fsdp=4, context=2),
    )
    outcome = command.train(config)
    assert outcome.held_out["held_out_accuracy"] == 1
    assert outcome.held_out["held_out_preferences"] > 20


def test_a_reward_model_wants_preferences(model, tmp_path):
    config = dataclasses.replace(pretrain.tiny(), workdir=tmp_path, model=model, mesh=Mesh(fsdp=8))
    with pytest.raises(ValueError, match=r"a reward model .* learns from preferences"):
        command.train(config)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(pipeline=2, fsdp=1), pytest.param(Mesh(pipeline=2, fsdp=2, context=2), marks=pytest.mark.slow)],
    ids=["pipeline", "pipeline+fsdp+context"],
)
def test_a_step_in_a_pipeline_is_that_of_one_device(model, params, mesh, tmp_path):
    """Two micro-batches; pairs whose two ends are in the parts of a row of different stages."""
    rng = np.random.default_rng(0)
    pairs = [
        Preference((ids(*rng.integers(0, 384, n)), ids(*rng.integers(0, 384, 32 - n))), 0.25 * n) for n in range(4, 12)
    ]
    leaves = PreferenceRows(pairs, 32).batch(range(8))
    leaves = {name: leaf.reshape(2, 4, 32) for name, leaf in leaves.items()}
    found = []
    for sizes in (Mesh(fsdp=1), mesh):
        config = dataclasses.replace(
            pretrain.tiny(), workdir=tmp_path, model=model, batch=Batch(size=8, micro_size=4, length=32), mesh=sizes,
            optimizer=Optimizer(epsilon=1e-4), compute=Compute(dtype="float32", remat="none"),
        )  # fmt: skip
        found.append(train(config, jax.device_get(params), leaves, loss=reward.loss))
    ((alone,), *those_alone), ((piped,), *those_piped) = found
    assert alone.keys() == piped.keys() and alone["tokens"] == 8
    for name, value in alone.items():
        np.testing.assert_allclose(piped[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(those_piped), jax.tree.leaves(those_alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
