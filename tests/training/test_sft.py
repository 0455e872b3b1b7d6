"""Fine-tuning: a run starts from the parameters of another and trains on conversations for full epochs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs import pretrain
from dsv2_jax import loading, train
from dsv2_jax.config import Batch, Cadence, Data, Optimizer
from dsv2_jax.data import chat
from dsv2_jax.training import checkpoint, metrics

LENGTH = 64


def tiny():
    """On the 8 devices of the tests, a sequence each."""
    config = pretrain.tiny()
    moe = dataclasses.replace(config.model.moe, budget_sequences=1)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model pretrained for a few steps on the text of the questions."""
    folder = tmp_path_factory.mktemp("base")
    text = "\n".join(f"User: {a} plus {b}?\n\nAssistant: {a + b}" for a in range(30) for b in range(30))
    (folder / "text.txt").write_text(text)
    config = dataclasses.replace(
        tiny(),
        workdir=folder / "run",
        tokens=4 * 8 * 32,
        batch=Batch(size=8, length=32),
        data=Data(source=str(folder / "text.txt"), folder=folder / "data"),
    )
    train.train(config)
    return config.workdir


@pytest.fixture(scope="module")
def fine_tuning(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(40):
            turns = [("user", f"{i} plus {i}?"), ("assistant", f"{2 * i}")] * (1 + i % 2)
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
        long = [{"role": "user", "content": "why? " * 200}, {"role": "assistant", "content": "because"}]
        file.write(json.dumps({"messages": long}) + "\n")
    return dataclasses.replace(
        tiny(),
        workdir=folder / "run",
        init=base,
        tokens=0,
        epochs=3,
        data=Data(source=str(folder / "chats.jsonl"), form="conversations", folder=folder / "data"),
        batch=Batch(size=8, length=LENGTH),
        optimizer=Optimizer(peak_lr=1e-30, warmup_steps=0, decay_at=(), weight_decay=0.0),
        cadence=Cadence(log=1, evaluate=100, save=100),
    )


def test_a_run_starts_from_another_and_learns_answers_for_whole_epochs(base, fine_tuning, capsys):
    outcome = train.train(fine_tuning)
    said = capsys.readouterr().out
    # A vanishing learning rate: what the run ends with is what it started from.
    before, after = (checkpoint.restore_params(run)[1] for run in (base, fine_tuning.workdir))
    assert np.array_equal(before["moe"]["w_gate_EDF"], after["moe"]["w_gate_EDF"])
    words = loading.load(fine_tuning.workdir).need_tokenizer()
    assert words.identity == loading.load(base).need_tokenizer().identity

    lines = [json.loads(line) for line in Path(fine_tuning.data.source).read_text().splitlines()]
    encoded = [chat.encode(line["messages"], words) for line in lines]
    fits = [e for e in encoded if len(e.ids) - 1 <= LENGTH]
    assert len(fits) == 40 and "1 conversations longer than a row: dropped" in said
    steps = metrics.read(fine_tuning.workdir)
    rows = outcome.progress.tokens // LENGTH
    assert rows >= 3 * sum(len(e.ids) - 1 for e in fits) * 0.9 / LENGTH
    assert outcome.held_out["held_out_tokens"] < sum(e.answers.sum() for e in fits) / 3
    assert len({line["step"] for line in steps}) == rows // 8


def test_parameters_of_another_shape_are_refused(fine_tuning, tmp_path):
    model = dataclasses.replace(fine_tuning.model, intermediate_size=64)
    config = dataclasses.replace(fine_tuning, workdir=tmp_path / "run", model=model)
    with pytest.raises(ValueError, match=r"the parameter dense\.w_down_ID in .* has the shape"):
        train.train(config)
