"""Reward models that reward: scores of padded batches, on one device and on eight, against each conversation alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, rows_of

from configs import pretrain
from dsv2_jax.alignment import reward
from dsv2_jax.alignment.judge import Judge
from dsv2_jax.config import SINGLE, Batch, Compute, Data, Mesh
from dsv2_jax.data import corpora, tokenizer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.training import checkpoint, run_folder

LENGTH = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("\n".join(f"User: pick {n}\n\nAssistant: {n % 10}" for n in range(900)))
    data = Data(source=str(folder / "text.txt"), folder=folder / "data")
    return tokenizer.for_config(data, 384, corpora.prepare(data))


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(
        pretrain.tiny(), batch=Batch(size=8, length=LENGTH), compute=Compute(dtype="float32", remat="none"), mesh=SINGLE
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory, words, config):
    """A run's folder of a reward model with drawn parameters, these, and its config."""
    model = dataclasses.replace(config.model, head="score")
    params = jax.tree.map(jnp.asarray, random_params(model))
    run, ours = tmp_path_factory.mktemp("judge") / "run", dataclasses.replace(config, model=model)
    checkpoint.save_params(run, ours, params)
    run_folder.keep_tokenizer(run, words.save)
    return run, params, ours


@pytest.mark.parametrize("mesh", [SINGLE, Mesh(fsdp=4, expert=2)], ids=["one device", "eight"])
def test_scores_are_those_of_each_conversation_alone(judged, words, config, mesh):
    run, params, ours = judged
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 384, n).tolist() for n in (LENGTH, 9) * 5]
    devices = device_mesh.make(mesh, jax.devices()[: mesh.size("fsdp", "expert")])
    found = Judge(run, dataclasses.replace(config, mesh=mesh), words, devices)(sequences)
    alone = jax.jit(lambda ids_BT: reward.scores(params, rows_of(ids_BT), ours)[0])
    for ids, score in zip(sequences, found, strict=True):
        expected_BT = alone(np.array([ids]))
        assert score == pytest.approx(float(expected_BT[0, -1]), rel=1e-4, abs=1e-5)


def test_a_model_that_scores_nothing_is_refused(tmp_path, words, config):
    run = tmp_path / "run"
    checkpoint.save_params(run, config, jax.tree.map(jnp.asarray, random_params(config.model)))
    run_folder.keep_tokenizer(run, words.save)
    with pytest.raises(ValueError, match="holds no reward model"):
        Judge(run, config, words, None)


def test_a_model_of_fewer_positions_than_a_conversation_has_tokens_is_refused(judged, words, config, tmp_path):
    """Otherwise all positions beyond its table of angles would get the last angle."""
    _, params, ours = judged
    short = dataclasses.replace(ours, model=dataclasses.replace(ours.model, max_position_embeddings=LENGTH))
    run = tmp_path / "run"
    checkpoint.save_params(run, short, params)
    run_folder.keep_tokenizer(run, words.save)
    Judge(run, config, words, None)
    longer = dataclasses.replace(config, batch=Batch(size=8, length=LENGTH + 1))
    with pytest.raises(ValueError, match="has 24 positions, but conversations have up to 25 tokens"):
        Judge(run, longer, words, None)
