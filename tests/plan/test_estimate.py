"""Estimates against published figures, suggestions for programs that do not fit, and mistakes on the command line."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import PRESETS, models
from dsv2_jax.config import Compute, Mesh
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.plan import report
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import estimate, model_flops
from dsv2_jax.plan.fit import doubled, max_rows, suggest
from dsv2_jax.plan.program import CompiledProgram, out_of_memory, sparsecore_calls

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("model", "step", "tokens", "chips", "mfu"),
    [(models.v2_lite(), 1.850, 262_144, 16, 0.317), (models.v2(), 11.937, 4_194_304, 256, 0.464)],
)
def test_model_flops_match_maxtext(model, step, tokens, chips, mfu):
    """Compares with the FLOPs in MaxText's published step times and MFU, which have three digits."""
    assert model_flops(model, 4096) * tokens / (step * chips * 459e12) == pytest.approx(mfu, abs=6e-4)


def test_flops_by_hand():
    """Two layers of two heads, with keys of width 2 + 2 and values of width 2, at 8 and 16 tokens."""
    tiny = models.tiny()
    attention = dataclasses.replace(
        tiny.attention, num_attention_heads=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2
    )
    model = dataclasses.replace(tiny, num_hidden_layers=2, attention=attention)
    longer = model_flops(model, 16) - model_flops(model, 8)
    assert longer == 3 * 2 * (2 * 2 * (4 + 2) * 16 / 2 - 2 * 2 * (4 + 2) * 8 / 2)
    assert model_flops(model, 16, "forward") == model_flops(model, 16) / 3
    # A decoded token attends to all 16 tokens, a token of a causal pass to half of them on average.
    assert model_flops(model, 16, "decode") - model_flops(model, 16, "forward") == 2 * 2 * 2 * (4 + 2) * 16 / 2


def program(used, fits=True, limit=0):
    return CompiledProgram(
        fits=fits,
        used=used,
        limit=limit,
        parameters=4,
        optimizer=8,
        cache=0,
        batch=1,
        gradients=4,
        coords=((0, 0, 0, 0, 0),),
        seconds=1.0,
        host_bytes=2**30,
    )


def config(**compute):
    tiny = PRESETS["tiny"]()
    batch = dataclasses.replace(tiny.batch, size=16, micro_size=16)
    model = dataclasses.replace(tiny.model, moe=dataclasses.replace(tiny.model.moe, budget_sequences=1))
    return dataclasses.replace(tiny, model=model, mesh=Mesh(fsdp=4), batch=batch, compute=Compute(**compute))


def test_a_v4_uses_xla_instead_of_the_kernels():
    kernels = {chip: laid_out(config(), Topology(f"{chip}:2x2x1")).compute.kernels for chip in ("v4", "v5p")}
    assert kernels == {"v4": "xla", "v5p": "pallas"}


def test_suggests_smaller_micro_batches_for_a_step_that_does_not_fit():
    topology, tried = Topology("v5p:2x2x1"), []

    def plan(changed, chips, _):
        tried.append((changed.compute.remat, changed.batch.micro_size, chips.name))
        here = laid_out(changed, chips)
        fits = changed.batch.micro_size == 4
        return estimate(
            here, chips, program(200 * 2**30, fits=False, limit=95 * 2**30) if not fits else program(90), ""
        )

    text = suggest(config(remat="attention"), topology, plan)
    assert tried == [("full", 16, "v5p:2x2x1"), ("full", 8, "v5p:2x2x1"), ("full", 4, "v5p:2x2x1")]
    assert text.startswith("it fits with --compute.remat full --batch.micro_size 4")
    assert "200.00 GiB" in text


def test_suggests_more_chips_last():
    names = []

    def plan(changed, chips, _):
        names.append(chips.name)
        return estimate(laid_out(changed, chips), chips, program(2**38, fits=False, limit=95 * 2**30), "")

    text = suggest(config(remat="full"), Topology("v5p:2x2x1"), plan)
    assert names == ["v5p:2x2x1", "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4"]
    assert text.startswith("no change that was tried fits")
    assert doubled(Topology("v6e:8x16")).name == "v6e:16x16"


def test_suggests_fewer_sequences_for_an_engine_that_does_not_fit():
    topology, wanted = Topology("v5p:2x2x1"), Capacity(rows=40, length=24, page=8).resolve(config().model, "xla")

    def plan(changed, chips, work):
        here = laid_out(changed, chips, work)
        assert here.batch.size == work.rows * 4
        found = program(90) if work.rows <= 10 else program(2**38, fits=False, limit=95 * 2**30)
        return estimate(here, chips, found, "", work=work)

    text = suggest(config(), topology, plan, wanted)
    assert text.startswith("it fits with --capacity.rows 10:")
    assert "--capacity.rows 20, 256.00 GiB" in text


def test_max_rows_finds_the_most_sequences_that_fit():
    """A device needs 10 GiB of parameters, 1/16 GiB per row and 1 GiB per 256 rows: 95 GiB hold 1,280 rows.

    The step at every 256 rows makes the first, proportional guess too high.
    """
    tried = []

    def plan(changed, chips, work):
        tried.append(work.rows)
        cache, extra = work.rows * 2**30 // 16, work.rows // 256 * 2**30
        used = 10 * 2**30 + cache + extra
        fits, limit = used <= 95 * 2**30, 95 * 2**30
        known = {"parameters": 10 * 2**30, "cache": cache, "optimizer": 0, "gradients": 0, "batch": 0}
        found = dataclasses.replace(program(used, fits=fits, limit=limit), **known)
        return estimate(laid_out(changed, chips, work), chips, found, "", work=work)

    capacity, e = max_rows(config(), Topology("v5p:2x2x1"), Capacity(rows=64, length=24), plan)
    assert capacity.rows == e.sequences // 4 == 1280
    assert e.memory.cache == 80 * 2**30 and e.weights == "compute"
    assert max(tried) > 1280 and len(tried) <= 4

    def never(changed, chips, work):
        found = program(2**38, fits=False, limit=95 * 2**30)
        return estimate(laid_out(changed, chips, work), chips, found, "", work=work)

    with pytest.raises(ValueError, match="8 sequences of 24 tokens per device do not fit"):
        max_rows(config(), Topology("v5p:2x2x1"), Capacity(rows=8, length=24), never)


def test_a_program_that_does_not_fit_has_no_time():
    e = estimate(
        laid_out(config(), Topology("v5p:2x2x1")), Topology("v5p:2x2x1"), program(2**37, fits=False, limit=2**36), ""
    )
    assert e.time is None
    assert "needs 128.00 GiB, has 64.00" in report.table(e)
    json.dumps(dataclasses.asdict(e))


def test_out_of_memory_messages_are_parsed():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity"
    )
    assert out_of_memory(message) == (int(17.25 * 2**30), int(15.75 * 2**30))
    other = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.55G) exceeds available HBM (15.75G). HLO module: jit_decode_step."
    )
    assert out_of_memory(other) == (int(16.55 * 2**30), int(15.75 * 2**30))
    assert out_of_memory("INTERNAL: something else") == (0, 0)


def test_sparsecore_calls_become_plain_calls():
    custom = '%c = f32[8]{0} custom-call(%p), custom_call_target="TODO(b/1)", called_computations={%x.9}, metadata={}'
    assert sparsecore_calls(custom) == "%c = f32[8]{0} call(%p), to_apply=%x.9, metadata={}"
    kernel = '%c = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"'
    assert sparsecore_calls(kernel) == kernel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v3", "--topology", "v5p:2x2x1"], "unknown preset 'v3'; did you mean v2?"),
        (["tiny"], "--topology is missing"),
        (["tiny", "--topology", "v5p"], "a topology is CHIP:XxYxZ"),
        (["tiny", "--topology", "v5q:2x2x1"], "unknown chip 'v5q'; did you mean v5p?"),
        (["tiny", "--topology", "v5p:4x4"], "a topology of v5p has 3 dimensions"),
        (["tiny", "--topology", "v5p:2x2x1", "--mesh.fsdp", "3"], "does not fit 4 devices"),
        (["tiny", "--topology", "v5p:2x2x1", "--search", "--forward"], "--search compares training steps"),
        (
            ["tiny", "--topology", "v5p:2x2x1", "--forward", "--decode"],
            "--forward and --decode plan different programs",
        ),
        (["tiny", "--topology", "v5p:2x2x1", "--max-rows"], "--max-rows is for a decode step: add --decode"),
        (["tiny", "--topology", "v5p:2x2x1", "--decode", "--mesh.context", "4", "--mesh.fsdp", "1"], "generation runs"),
        (["tiny", "--topology", "v5p:2x2x1", "--toplogy", "x"], "unknown flag --toplogy; did you mean --topology?"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "dsv2_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.tpu
def test_command_plans_a_preset_and_caches_the_program(tmp_path):
    """Compiles a preset and writes its JSON and HLO. The second run reads the program from the cache."""
    flags = ["tiny", "--topology", "v5p:2x2x1", "--batch.size", "8", "--mesh.fsdp", "4", "--tokens", "10000"]
    # The cost model of the kernels does not cover such small widths.
    flags += ["--model.moe.budget_sequences", "2", "--compute.kernels", "xla"]
    files = ["--json", str(tmp_path / "plan.json"), "--hlo", str(tmp_path / "hlo.gz")]
    command = [sys.executable, "-m", "dsv2_jax.plan", *flags, *files]
    run = functools.partial(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = (run(env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}) for _ in range(2))
    assert "compiling" in first.stderr and "compiling" not in second.stderr
    assert first.stdout == second.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] and figures["memory"]["peak"] > figures["memory"]["parameters"] > 0
    assert figures["time"]["step"] == pytest.approx(
        sum(figures["time"][part] for part in ("xla", "unestimated", "kernels", "exposed", "copies"))
    )
    assert {x["kind"] for x in figures["traffic"]} >= {"all-gather"}


@pytest.mark.tpu
def test_gradients_are_summed_between_slices(tmp_path):
    """With one replica on each of two slices, every device sends its quarter of the gradients to the other slice."""
    flags = ["tiny", "--topology", "v4:2x2x1", "--mesh.slices", "2", "--mesh.data", "2", "--mesh.fsdp", "4"]
    flags += ["--batch.size", "8", "--tokens", "10000", "--model.moe.budget_sequences", "1"]
    command = [sys.executable, "-m", "dsv2_jax.plan", *flags, "--json", str(tmp_path / "plan.json")]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "plan.json").read_text())
    wire = sum(x["wire"] for x in figures["traffic"] if x["axes"] == "slice")
    gradients = figures["memory"]["gradients"]
    # An all-reduce of two sends its operand once; small arrays are padded to tiles.
    assert gradients <= wire < 3 * gradients


@pytest.mark.tpu
def test_command_plans_a_decode_step(tmp_path):
    """The cache is the bfloat16 latent of every slot, and each layer calls the attention kernel once."""
    flags = ["nano", "--decode", "--topology", "v5p:2x2x1", "--mesh.fsdp", "4", "--capacity.rows", "8"]
    flags += ["--capacity.length", "512", "--capacity.page", "128"]
    command = [sys.executable, "-m", "dsv2_jax.plan", *flags, "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "time of a decode step" in done.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    model = models.nano()
    pages = 8 * 512 // 128 + 1  # one more page for padding
    assert figures["memory"]["cache"] == 2 * pages * 128 * model.cache_elements
    assert figures["sequences"] == 4 * 8
    calls = {x["name"]: x["count"] for x in figures["kernels"]}
    assert calls["latent_decode"] == model.num_hidden_layers
    assert figures["tokens_per_second_per_chip"] == pytest.approx(8 / figures["time"]["step"])


@pytest.mark.tpu
def test_context_parallelism_gathers_only_the_latent(tmp_path):
    """A forward pass with positions sharded over four chips gathers 16 + 8 numbers per token and layer."""
    flags = ["tiny", "--forward", "--topology", "v5p:2x2x1", "--batch.size", "2", "--batch.length", "1024"]
    flags += ["--mesh.fsdp", "1", "--mesh.context", "4", "--mesh.shard", "optimizer", "--compute.kernels", "xla"]
    command = [sys.executable, "-m", "dsv2_jax.plan", *flags, "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "time of a forward pass" in done.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    wire = {x["kind"]: x["wire"] for x in figures["traffic"]}
    tokens, segments = 2 * 1024, 4  # bytes of a token's segment id, which every device needs for the mask
    assert wire.pop("all-gather") == 3 / 4 * tokens * (3 * (16 + 8) * 2 + segments)
    assert sum(wire.values()) < 10_000  # sums of the evaluation's metrics
    assert figures["memory"]["optimizer"] == figures["memory"]["gradients"] == 0
