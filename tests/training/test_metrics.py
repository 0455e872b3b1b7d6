"""metrics.jsonl: exact values of each step, no step twice, and no lines of steps that a killed run lost."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs import PRESETS, models
from dsv2_jax.config import Cadence
from dsv2_jax.training import metrics, plots
from dsv2_jax.training.checkpoint import Progress


@pytest.fixture
def config(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    return dataclasses.replace(PRESETS["tiny"](), workdir=workdir, tokens=100 * 128, cadence=Cadence(log=5))


def record(log, steps, **changes):
    for step in steps:
        values = {"loss": step + 0.5, "nll": step, "grad_norm": 2.0, "skipped": 0.0, "dropped": 0.25}
        values |= {"tokens": 3, "bytes": 9} | changes
        figures = {name: jnp.float32(value) for name, value in values.items()}
        figures["load_LE"] = jnp.array([[0.5, 1.5], [1.0, 1.0]])
        log.record(Progress(step=step, tokens=128 * step), 1e-3, figures)


def test_lines_at_the_cadence_hold_their_own_step(config):
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte") as log:
        record(log, range(1, 13))
        log.flush()
    lines = metrics.read(config.workdir)
    assert [line["step"] for line in lines] == [5, 10]
    line = lines[1]
    assert (line["tokens"], line["loss"], line["nll"], line["lr"]) == (1280, 10.5, 10.0, 1e-3)
    assert (line["load_max"], line["load_min"], line["dropped"], line["skipped"]) == (1.5, 0.5, 0.25, 0)
    # Three counted tokens of 10 nats each stand for 9 bytes.
    assert line["bits_per_byte"] == pytest.approx(10 * 3 / 9 / math.log(2))
    assert line["tokens_per_second"] > 0 and line["mfu"] > 0
    assert list((config.workdir / "tensorboard").iterdir())


def test_a_refused_step_has_its_line_and_its_sentence(config, capsys):
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte") as log:
        record(log, [1])
        record(log, [2], loss=math.nan, nll=math.nan, skipped=1.0)
        record(log, [3])
        log.flush()
    (line,) = metrics.read(config.workdir)
    assert (line["step"], line["skipped"], line["loss"], line["bits_per_byte"]) == (2, 1, None, None)
    assert "step 2: loss, gradient norm or update is not finite; the update was skipped" in capsys.readouterr().out


def test_a_resumed_run_has_every_step_once(config):
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte") as log:
        record(log, range(1, 26))
        log.flush()
    path = config.workdir / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 30, "lo')  # killed in the middle of a line
    with metrics.Log(config, Progress(step=12, tokens=12 * 128), "pretraining", "bits_per_byte") as log:
        assert [line["step"] for line in metrics.read(config.workdir)] == [5, 10]
        record(log, range(13, 21))
        log.flush()
    assert [line["step"] for line in metrics.read(config.workdir)] == [5, 10, 15, 20]
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte"):
        pass
    assert metrics.read(config.workdir) == []


def test_evaluations_are_lines_too_and_give_the_pictures(config):
    result = {"nll": 2.0, "perplexity": math.exp(2), "bits_per_byte": 1.5, "tokens": 10, "bytes": 20}
    result["load_LE"] = np.array([[0.0, 2.5], [1.0, 1.0]])
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte") as log:
        record(log, range(1, 11))
        log.held_out(Progress(step=10, tokens=1280), result, full=False)
        record(log, range(11, 101))
        log.held_out(Progress(step=100, tokens=12800), result, full=True)
    lines = [line for line in metrics.read(config.workdir) if "held_out_nll" in line]
    assert [line["step"] for line in lines] == [10, 100]
    assert (lines[0]["held_out_bits_per_byte"], lines[0]["held_out_load_max"]) == (1.5, 2.5)
    assert "held_out_load_LE" not in lines[0] and lines[1]["held_out_load_LE"] == [[0.0, 2.5], [1.0, 1.0]]
    assert lines[1]["held_out_whole"] is True
    assert [path.name for path in plots.draw(config.workdir)] == ["loss.png", "expert_load.png"]
    for path in (config.workdir / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_lines_are_strict_json(config):
    with metrics.Log(config, Progress(), "pretraining", "bits_per_byte") as log:
        record(log, range(1, 6), grad_norm=math.inf)
        log.flush()

    def refuse(word):
        raise AssertionError(word)

    for line in (config.workdir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["grad_norm"] is None


def test_flops_of_v2_by_hand():
    # 20,851,512,320 activated parameters; 60 layers, 128 heads, 192 wide keys and 128 wide values, half of 4,096.
    by_hand = 6 * 20_851_512_320 + 3 * 2 * 60 * 128 * (192 + 128) * 4096 / 2
    assert metrics.flops_per_token(models.v2(), 4096) == by_hand


def test_a_cpu_is_measured():
    assert 1e8 < metrics.peak_flops("float32") < 1e14
