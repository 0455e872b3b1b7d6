"""eval.py and generation as a user runs them, and perplexity against float64."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GOLDEN, give_tokenizer, make_run, random_params

from configs import models
from dsv2_jax import hf, loading
from dsv2_jax.config import Batch, Compute, Config
from dsv2_jax.data import tokenizer
from dsv2_jax.evaluation import perplexity, text
from dsv2_jax.model import transformer
from dsv2_jax.training import checkpoint

ROOT = Path(__file__).parent.parent
EXACT = Compute(dtype="float32", remat="none")


def command(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False)


def refused(told: str, *words: object) -> None:
    """Exit code 2 and one line on stderr that says this."""
    end = command(*words)
    assert end.returncode == 2, end.stderr
    assert told in end.stderr
    assert len(end.stderr.splitlines()) == 1
    assert end.stdout == ""


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "v2_tiny" / "golden.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, dataclasses.replace(models.tiny(), vocab_size=512))
    give_tokenizer(folder)
    return folder


def test_logits_of_token_ids(golden, tmp_path):
    np.save(tmp_path / "ids.npy", golden["ids_short"])
    files = ("--token-ids", tmp_path / "ids.npy", "--logits", tmp_path / "logits.npy")
    end = command("eval.py", "--checkpoint", GOLDEN / "v2_tiny", *files)
    assert end.returncode == 0, end.stderr
    found = np.load(tmp_path / "logits.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, golden["logits_short"], atol=1e-4, rtol=0)


def test_greedy_generation_from_token_ids(golden, tmp_path):
    np.save(tmp_path / "prompt.npy", golden["gen_prompt"])
    files = ("--prompt-ids", tmp_path / "prompt.npy", "--out-ids", tmp_path / "out.npy")
    flags = ("--max-new", 160, "--temperature", 0)
    end = command("-m", "dsv2_jax.generate", "--checkpoint", GOLDEN / "v2_tiny", *files, *flags)
    assert end.returncode == 0, end.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), golden["gen_ids"])


def nll_of(logits_TW: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    """Nats per position in float64."""
    z = logits_TW.astype(np.float64)
    top = z.max(-1, keepdims=True)
    sums = top[..., 0] + np.log(np.exp(z - top).sum(-1))
    return sums - np.take_along_axis(z, targets_T[..., None], -1)[..., 0]


@functools.partial(jax.jit, static_argnames="model")
def outputs(params, batch, *, model) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and statistics of a packed batch, in float32."""
    inputs = {name: batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT")}
    out = transformer.forward(params, inputs, model=model, compute=EXACT)
    return transformer.logits(params, out.hidden_BTD), out.statistics


def test_figures_of_a_text(run, tmp_path):
    texts = ["The sea is calm, and the moon lies fair.", "海上生明月，天涯共此时。"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ("--text", tmp_path / "text.jsonl", "--json", tmp_path / "figures.json", "--length", 96)
    end = command("eval.py", "--checkpoint", run, *flags)
    assert end.returncode == 0, end.stderr
    assert "bits per byte" in end.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())

    words, model = tokenizer.load(run / "tokenizer"), dataclasses.replace(models.tiny(), vocab_size=512)
    ids = [[words.bos_id, *words.encode(text), words.eos_id] for text in texts]
    seen = np.arange(95) < np.array([[len(row) - 1] for row in ids])
    whole = np.array([row + [0] * (96 - len(row)) for row in ids], np.int32)  # each in a row of its own
    batch = {"tokens_BT": whole[:, :-1], "positions_BT": np.arange(95)[None] * seen, "segments_BT": seen.astype(int)}
    logits, _ = outputs(random_params(model), batch, model=model)
    total, count = nll_of(np.asarray(logits), whole[:, 1:])[seen].sum(), seen.sum()
    size = len("".join(texts).encode())
    assert (figures["tokens"], figures["bytes"]) == (count, size)
    assert figures["nll"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(total / np.log(2) / size, rel=1e-5)


def test_a_missing_checkpoint(tmp_path):
    refused("no checkpoint in", "eval.py", "--checkpoint", tmp_path / "nothing")


def test_an_unknown_task_is_refused(run):
    words = ("--tasks", "offline_mmul", "--skip-text")
    refused("no task 'offline_mmul'; did you mean offline_mmlu?", "eval.py", "--checkpoint", run, *words)


def test_needles_longer_than_the_model(run):
    words = ("--needle", "--haystack.lengths", 5000, "--skip-text")
    refused("exceed the model's 1024 positions", "eval.py", "--checkpoint", run, *words)


def test_a_truncated_checkpoint(tmp_path, golden):
    shutil.copytree(GOLDEN / "v2_tiny", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    np.save(tmp_path / "ids.npy", golden["ids_short"])
    files = ("--token-ids", tmp_path / "ids.npy", "--logits", tmp_path / "logits.npy")
    refused("is truncated", "eval.py", "--checkpoint", tmp_path / "hf", *files)
    assert not (tmp_path / "logits.npy").exists()


def test_a_text_that_is_not_utf8(run, tmp_path):
    (tmp_path / "text.txt").write_bytes("Müller".encode("latin-1"))
    refused("UTF-8", "eval.py", "--checkpoint", run, "--text", tmp_path / "text.txt")


def test_a_tokenizer_of_another_model(tmp_path, run):
    """More ids than the vocabulary has, in a Hugging Face folder and in a run's."""
    shutil.copytree(GOLDEN / "v2_tiny", tmp_path / "hf")
    for file in (run / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "hf" / file.name)
    refused("160", "eval.py", "--checkpoint", tmp_path / "hf")
    make_run(tmp_path / "run", models.tiny())
    shutil.copytree(run / "tokenizer", tmp_path / "run" / "tokenizer")
    refused("they do not belong together", "eval.py", "--checkpoint", tmp_path / "run")


def test_perplexity_over_a_padded_last_batch(tmp_path):
    model, rng = models.tiny(), np.random.default_rng(5)
    params = jax.tree.map(jnp.asarray, random_params(model))
    config = Config(workdir=tmp_path, model=model, batch=Batch(size=2, length=16), tokens=1000, compute=EXACT)
    bytes_per_token = rng.integers(0, 5, model.vocab_size)
    batches, total, count, text_bytes, chosen = [], 0.0, 0, 0, 0.0
    for valid in ([16, 16], [16, 5], [3, 0]):
        seen = np.arange(16) < np.array(valid)[:, None]
        drawn = {name: rng.integers(0, model.vocab_size, (2, 16), np.int32) for name in ("tokens_BT", "targets_BT")}
        batch = {name: np.where(seen, ids, 0) for name, ids in drawn.items()}
        batch |= {
            "positions_BT": np.where(seen, np.arange(16), 0).astype(np.int32),
            "segments_BT": seen.astype(np.int32),
            "weights_BT": seen.astype(np.float32),
        }
        batch["bytes_BT"] = bytes_per_token[batch["targets_BT"]].astype(np.int32)
        batches.append(batch)
        logits, statistics = outputs(params, batch, model=model)
        total += nll_of(np.asarray(logits), batch["targets_BT"])[seen].sum()
        experts = np.asarray(statistics["experts_BTK"])[:, seen]
        chosen = chosen + np.stack([np.bincount(layer.ravel(), minlength=16) for layer in experts])
        text_bytes += bytes_per_token[batch["targets_BT"]][seen].sum()
        count += seen.sum()
    figures = perplexity.evaluate(params, batches, config=config)
    assert (figures["tokens"], figures["bytes"]) == (count, text_bytes)
    assert figures["nll"] == pytest.approx(total / count, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(total / np.log(2) / text_bytes, rel=1e-6)
    np.testing.assert_allclose(figures["load_LE"], chosen * 16 / (4 * count), rtol=1e-5)


def test_perplexity_of_nothing_is_refused(tmp_path):
    config = Config(workdir=tmp_path, model=models.tiny(), batch=Batch(size=2, length=16), tokens=1000)
    with pytest.raises(ValueError, match="the data hold no token to predict"):
        perplexity.evaluate({}, [], config=config)


def damaged(folder, run, name, number):
    """A copy of the run with one weight of the last layer replaced."""
    config, params = checkpoint.restore_params(run)
    params["head"][name] = params["head"][name].at[0].set(number)
    checkpoint.save_params(folder, dataclasses.replace(config, workdir=folder), params, step=7)
    shutil.copytree(run / "tokenizer", folder / "tokenizer")
    return folder


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    folder = damaged(tmp_path / "nan", run, "norm_D", jnp.nan)
    hf.export(folder, tmp_path / "hf")
    (tmp_path / "text").write_text("hello there")
    told = "hold NaN or infinity: head.norm_D"
    refused(told, "eval.py", "--checkpoint", folder, "--text", tmp_path / "text", "--json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    for source in (folder, tmp_path / "hf"):
        with pytest.raises(ValueError, match=told):
            loading.load(source)
        for weights in ("compute", "int8"):
            with pytest.raises(ValueError, match=told):
                loading.load_for_engine(source, weights=weights)


def test_a_loss_that_is_not_finite_is_no_figure(run, tmp_path):
    """Finite weights whose logits overflow."""
    folder = damaged(tmp_path / "huge", run, "norm_D", 3e38)
    (tmp_path / "text").write_text("hello there")
    with pytest.raises(ValueError, match=r"the loss of .*huge on this text is (nan|inf), not a finite number"):
        text.evaluate(loading.load(folder), str(folder), None, text=tmp_path / "text", length=16)
