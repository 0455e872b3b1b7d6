"""--init: the model section is the checkpoint's, except for what the stage sets and the flags given."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from tiny import RELEASED_V2, give_tokenizer, make_run

from configs import PRESETS, SETS, models
from dsv2_jax import hf, loading, start, train
from dsv2_jax.config import Batch, Model, Rope
from dsv2_jax.data import corpora, pipeline
from dsv2_jax.training import metrics, run_folder

OTHERS = ("auto_map", "transformers_version")  # of other files and of another library
RELEASED = {name: value for name, value in RELEASED_V2.items() if name not in OTHERS}


def configure(name, *flags):
    return start.configure(PRESETS[name](), [str(flag) for flag in flags], SETS.get(name, ()), "train.py")


@pytest.fixture
def released(tmp_path):
    """The folder of a model like the released one, but for its weights: theta, epsilon and scale are its own too."""
    folder = tmp_path / "released"
    folder.mkdir()
    own = {"rope_theta": 50000, "rms_norm_eps": 1e-05, "routed_scaling_factor": 2.5}
    (folder / "config.json").write_text(json.dumps(RELEASED | own))
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_the_checkpoints_meaning(name, released):
    """The fields of the released V2 that a preset's stage changes, and their values, written by hand."""
    preset = PRESETS[name]().model
    wanted = hf.from_hf_config(json.loads((released / "config.json").read_text()))
    recipe = {field.removeprefix("moe."): getattr(preset.moe, field.removeprefix("moe.")) for field in start.TRAINING}
    wanted = dataclasses.replace(wanted, moe=dataclasses.replace(wanted.moe, **recipe))
    if name in ("v2_long", "v2_lite_long", "nano_long"):
        factor, positions = {"v2_long": (40, 163_840), "v2_lite_long": (40, 32_768), "nano_long": (16, 8192)}[name]
        rope = dataclasses.replace(wanted.rope, factor=factor)
        wanted = dataclasses.replace(wanted, rope=rope, max_position_embeddings=positions)
    if name == "nano_reward":
        wanted = dataclasses.replace(wanted, head="score")
    config, lines = configure(name, "--init", released)
    assert config.model == wanted
    assert config.model.rope.factor == (16 if name == "nano_long" else 40)
    assert (config.batch, config.optimizer) == (PRESETS[name]().batch, PRESETS[name]().optimizer)
    told = {
        "nano_long": [
            "model.max_position_embeddings is 8192, in place of the checkpoint's 163840",
            "model.rope.factor is 16.0, in place of the checkpoint's 40.0",
        ],
        "v2_lite_long": ["model.max_position_embeddings is 32768, in place of the checkpoint's 163840"],
        "nano_reward": ["model.head is score, in place of the checkpoint's tokens"],
    }.get(name, [])
    assert lines == [f"model section as in {released}{', but:' if told else ''}", *told]


def test_a_stages_fields_and_training_fields_are_fields():
    known = start._fields(Model())
    assert set(start.TRAINING) <= set(known)
    assert {field for fields in SETS.values() for field in fields} <= set(known)
    assert set(SETS) <= set(PRESETS)


def test_a_run_extended_by_nano_long_is_fine_tuned_as_extended(tmp_path):
    """And of a run what a stage sets for training is the preset's too, and said."""
    extended = PRESETS["nano_long"]().model
    kept = dataclasses.replace(extended, moe=dataclasses.replace(extended.moe, capacity_factor=1.5))
    run = dataclasses.replace(PRESETS["nano_long"](), workdir=tmp_path / "long", model=kept)
    (tmp_path / "long" / "checkpoints" / "300" / "params").mkdir(parents=True)
    (tmp_path / "long" / "checkpoints" / "300" / "params" / "_METADATA").touch()
    run_folder.write_config(run.workdir, run)
    for folder in (run.workdir, run.workdir / "checkpoints" / "300"):
        config, lines = configure("nano_sft", "--init", folder, "--batch.length", 4096)
        assert config.model == extended
        assert lines[1:] == ["model.moe.capacity_factor is 1.0, in place of the checkpoint's 1.5"]


def test_a_flag_wins_by_name(released):
    config, lines = configure(
        "v2_sft", "--init", released, "--model.rope.factor", "20", "--model.max-position-embeddings=65536"
    )
    assert config.model.rope == Rope(theta=50_000, factor=20)
    assert lines[1:] == [
        "model.max_position_embeddings is 65536, in place of the checkpoint's 163840",
        "model.rope.factor is 20.0, in place of the checkpoint's 40.0",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.hidden_size", "64"], "model.hidden_size 64 in place of 5120: the parameters in"),
        (["--model.moe.n_shared_experts", "1", "--model.rope.theta", "9"], "model.moe.n_shared_experts 1 in place of"),
        (["--model.attention.q_lora_rank", "0"], "model.attention.q_lora_rank 0 in place of 1536"),
        (["--batch.length", "200000"], "batch.length (200000) exceeds model.max_position_embeddings (163840)"),
        (["--model.rope.factor", "4"], "model.max_position_embeddings (163840) exceeds the range of RoPE"),
        (["--model.rope.facto", "4"], "did you mean --model.rope.factor?"),
        (["--init", "/nowhere"], "no checkpoint in /nowhere"),
        (["--init"], "--init"),
    ],
)
def test_mistakes_are_one_line(released, flags, words, capsys, monkeypatch):
    from dsv2_jax import cli

    argv = ["train.py", "v2_sft", "--workdir", str(released / "run"), "--init", str(released), *flags]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.main(train.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert words in err and not (released / "run").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny model with YaRN by 40, with a tokenizer; its parameters are random and large."""
    base = tmp_path_factory.mktemp("released")
    tiny = models.tiny()
    model = dataclasses.replace(
        tiny,
        vocab_size=512,
        initializer_range=0.02,
        max_position_embeddings=160,
        rope=Rope(theta=1000, factor=40, original_max_position_embeddings=4),
        moe=dataclasses.replace(tiny.moe, expert_balance=0.001, routed_scaling_factor=2.5),
        rms_norm_eps=1e-5,
    )
    make_run(base / "run", model)
    give_tokenizer(base / "run")
    hf.export(base / "run", base / "hf", "bfloat16")
    return base / "hf"


@pytest.fixture(scope="module")
def fine_tuned(folder, tmp_path_factory):
    """`v2_sft` shrunk by flags, that takes no step: train.py's folder."""
    base = tmp_path_factory.mktemp("sft")
    with (base / "chats.jsonl").open("w") as file:
        for i in range(60):
            messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"return {i} " * 4}]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = [
        "--init", folder, "--data.source", base / "chats.jsonl", "--data.folder", base / "data",
        "--batch.size", 8, "--batch.length", 128, "--compute.dtype", "float32", "--compute.remat", "none",
        "--compute.loss_chunk", 64, "--model.moe.budget_sequences", 1, "--workdir", base / "run",
    ]  # fmt: skip
    return base, [str(flag) for flag in flags]


def run_train(monkeypatch, preset, flags):
    monkeypatch.setattr("sys.argv", ["train.py", preset, *flags])
    assert train.main() == 0


def nll_of_transformers(judge, config):
    """Mean over answers' tokens of the first batch, each conversation of a row by itself."""
    corpus = corpora.prepare(config.data)
    words = loading.tokenizer_for(config, corpus)
    batch = next(pipeline.train_batches(config, corpus, words))
    total = weight = 0.0
    for row in range(config.batch.size):
        for segment in range(1, batch["segments_BT"][row].max() + 1):
            tokens, targets, weights = (
                batch[name][row][batch["segments_BT"][row] == segment]
                for name in ("tokens_BT", "targets_BT", "weights_BT")
            )
            with torch.no_grad():
                logp = judge(torch.tensor(tokens)[None].long()).logits[0].log_softmax(-1).numpy()
            total -= (weights * logp[np.arange(len(targets)), targets]).sum()
            weight += weights.sum()
    return total / weight


def test_the_first_steps_loss_is_that_of_transformers(folder, fine_tuned, monkeypatch, capsys):
    """With the preset for V2, whose own model section has factor 1, which would shift the loss by tenths."""
    base, flags = fine_tuned
    flags = [*flags, "--workdir", str(base / "step"), "--epochs", "0", "--tokens", str(8 * 128), "--cadence.log", "1"]
    run_train(monkeypatch, "v2_sft", [*flags, "--model.moe.capacity_factor", "0"])
    assert f"model section as in {folder}\n" in capsys.readouterr().out
    (first,) = [line for line in metrics.read(base / "step") if "nll" in line]
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = nll_of_transformers(judge, run_folder.read_config(base / "step"))
    assert wanted > 3
    assert first["nll"] == pytest.approx(wanted, abs=1e-4)


def test_without_a_step_the_export_says_what_the_folder_said(folder, fine_tuned, monkeypatch, capsys):
    """No step, an evaluation of the start, a checkpoint; and every field and every number of the folder back."""
    base, flags = fine_tuned
    run_train(monkeypatch, "v2_sft", [*flags, "--epochs", "0"])
    assert "bits per byte" in capsys.readouterr().out
    hf.export(base / "run", base / "hf", "bfloat16")
    before, after = (json.loads((at / "config.json").read_text()) for at in (folder, base / "hf"))
    assert set(before) == set(RELEASED) and before["rope_scaling"]["factor"] == 40
    assert after == before
    assert json.dumps(after, sort_keys=True) == json.dumps(before, sort_keys=True)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert all((folder / name).read_bytes() == (base / "hf" / name).read_bytes() for name in shards) and shards


def test_a_run_goes_on_with_its_own_model_and_without_its_init(folder, fine_tuned, monkeypatch, tmp_path):
    _, flags = fine_tuned
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    flags = [*flags, "--init", str(gone), "--workdir", str(tmp_path / "run")]
    run_train(monkeypatch, "v2_sft", [*flags, "--epochs", "0"])
    model = run_folder.read_config(tmp_path / "run").model
    shutil.rmtree(gone)
    run_train(monkeypatch, "v2_sft", [*flags, "--epochs", "0"])
    assert run_folder.read_config(tmp_path / "run").model == model
    without = [flag for flag in flags if flag not in ("--init", str(gone), str(folder))]
    config, _ = configure("v2_sft", *without, "--epochs", "0", "--tokens", 2 * 8 * 128)
    assert (config.init, config.model) == (gone, model)


def test_positions_of_the_checkpoint_bound_the_rows(folder):
    assert configure("v2_sft", "--init", folder, "--batch.length", 160)[0].batch == Batch(size=256, length=160)
