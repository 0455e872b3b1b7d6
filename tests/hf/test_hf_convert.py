"""Export and import of folders: byte for byte, as transformers and mlx-lm read them, and within memory."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from folders import contents, tensors
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from tiny import GOLDEN, MODELS, ROOT, give_tokenizer, make_run

from configs import models
from dsv2_jax.data import tokenizer
from dsv2_jax.hf import export, import_, is_hf, load_params
from dsv2_jax.training import checkpoint, run_folder


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A run's folder, its export in several files, its parameters."""
    folder = tmp_path_factory.mktemp(request.param)
    params = make_run(folder / "run", MODELS[request.param]())
    export(folder / "run", folder / "hf", shard_bytes=50_000)
    return folder / "run", folder / "hf", params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_is_the_same_to_the_byte(exported, dtype, tmp_path):
    run, _, _ = exported
    export(run, tmp_path / "a", dtype, shard_bytes=50_000)
    import_(tmp_path / "a", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "b", dtype, shard_bytes=50_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "run"}


def test_other_files_in_the_folder_are_left_alone(exported, tmp_path):
    """Also a folder of the name that an import once wrote into and cleared; and nothing of a failed one stays."""
    run, hf, _ = exported
    theirs = tmp_path / "run.partial"
    theirs.mkdir()
    (theirs / "precious").write_text("x")
    import_(hf, tmp_path / "run")
    with pytest.raises(ValueError, match="is not an empty folder"):
        import_(hf, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        export(run, tmp_path / "hf", progress=lambda *_: 1 // 0)
    assert (theirs / "precious").read_text() == "x"
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.partial"}


def test_of_two_imports_the_second_to_end_is_refused(exported, tmp_path):
    _, hf, params = exported

    def meanwhile(done, total):
        if done == total and not (tmp_path / "run").exists():
            import_(hf, tmp_path / "run")

    with pytest.raises(ValueError, match="was written by another process in the meantime"):
        import_(hf, tmp_path / "run", progress=meanwhile)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_params(tmp_path / "run")[1], params)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("made_by", ["orbax", "import"])
def test_damage_is_not_exported(exported, tmp_path, made_by):
    run, hf, _ = exported
    if made_by == "orbax":
        shutil.copytree(run, tmp_path / "run")
    else:
        import_(hf, tmp_path / "run")
    parameters = (tmp_path / "run").glob("checkpoints/*/params/**/*")
    path = max((p for p in parameters if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"the checkpoint of step \d in .*run is damaged: "):
        export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"the checkpoint of step \d in .*run is damaged: "):
        checkpoint.restore_params(tmp_path / "run")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_import_is_a_run_that_orbax_restores(exported, tmp_path):
    _, hf, params = exported
    import_(hf, tmp_path / "run")
    config, restored = checkpoint.restore_params(tmp_path / "run")
    assert config.workdir == tmp_path / "run"
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        assert manager.latest_step() == 0
        plain = manager.restore(0)["params"]
    jax.tree.map(np.testing.assert_array_equal, plain, params)


def test_load_params_straight_from_the_folder(exported):
    run, hf, params = exported
    model, loaded = load_params(hf)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert model.attention == run_folder.read_config(run).model.attention
    assert is_hf(hf)
    assert not is_hf(run)


def test_files_are_small_and_listed(exported):
    _, hf, params = exported
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(hf.glob("*.safetensors")):
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 50_000
        found |= dict.fromkeys(held, file.name)
    assert found == index["weight_map"]
    assert len(set(found.values())) > 1
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_transformers_loads_every_tensor_as_it_is(exported):
    _, hf, _ = exported
    model, info = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    theirs, files = dict(model.state_dict()), tensors(hf)
    for name in [name for name in theirs if name.endswith("mlp.experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        fused, down = theirs.pop(name), theirs.pop(stem + "down_proj")
        for expert in range(len(fused)):
            gate, up = fused[expert].chunk(2)
            theirs[f"{stem}{expert}.gate_proj.weight"], theirs[f"{stem}{expert}.up_proj.weight"] = gate, up
            theirs[f"{stem}{expert}.down_proj.weight"] = down[expert]
    assert set(theirs) == set(files)
    for name, tensor in files.items():
        assert torch.equal(theirs[name], tensor), name


def test_transformers_and_mlx_lm_agree_on_the_export(exported):
    """Two readers of the same config.json and weights, each with its own YaRN, groups and rope layout."""
    _, hf, _ = exported
    ids = np.random.default_rng(1).integers(0, 160, (2, 200))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(torch.tensor(ids)).logits
    model, _ = mlx_lm.utils.load_model(hf)
    weights = dict(tree_flatten(model.parameters()))
    assert all(value.dtype == mx.float32 for value in weights.values() if mx.issubdtype(value.dtype, mx.floating))
    with mx.stream(mx.cpu):
        mlx = np.array(model(mx.array(ids)))
    assert theirs.std() > 0.5
    np.testing.assert_allclose(mlx, theirs.numpy(), atol=2e-4)


def test_a_log_gets_a_line_for_every_tenth(exported, tmp_path):
    _, hf, _ = exported
    command = [sys.executable, "-m", "dsv2_jax.hf", "import", "--hf", hf, "--out", tmp_path / "run"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("importing")]
    assert 5 < len(lines) <= 10
    assert lines[-1].startswith("importing  100%")


def test_bfloat16_is_rounded_as_torch_rounds(exported, tmp_path):
    run, hf, _ = exported
    export(run, tmp_path / "hf", "bfloat16")
    rounded = tensors(tmp_path / "hf")
    for name, tensor in tensors(hf).items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_travels(tmp_path):
    make_run(tmp_path / "run", dataclasses.replace(models.tiny(), vocab_size=512))
    give_tokenizer(tmp_path / "run")
    ours = tokenizer.load(tmp_path / "run" / "tokenizer")
    export(tmp_path / "run", tmp_path / "a")
    text = "def f(x):  # 42 and 诗\n    return x\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "a" / file).read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    import_(tmp_path / "a", tmp_path / "back")
    config = run_folder.read_config(tmp_path / "back")
    assert tokenizer.load(Path(config.data.tokenizer)).encode(text) == ours.encode(text)
    export(tmp_path / "back", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("name", ["v2_tiny", "mscale_tiny"])
def test_golden_checkpoints_come_back_exactly(name, tmp_path):
    import_(GOLDEN / name, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    before, after = tensors(GOLDEN / name), tensors(tmp_path / "hf")
    assert set(before) == set(after)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_float16_is_read(tmp_path):
    half = {name: tensor.half() for name, tensor in tensors(GOLDEN / "v2_tiny").items()}
    shutil.copy(GOLDEN / "v2_tiny" / "config.json", tmp_path)
    save_file(half, tmp_path / "model.safetensors")
    _, params = load_params(tmp_path)
    np.testing.assert_array_equal(params["embed"]["w_embed_WD"], half["model.embed_tokens.weight"].float().numpy())


MEASURE = """
import sys
from pathlib import Path
import jax
from dsv2_jax.hf import export, import_, is_hf
jax.numpy.zeros(8).block_until_ready()
import_(Path(sys.argv[1]), Path(sys.argv[2]) / "warm")
export(Path(sys.argv[2]) / "warm", Path(sys.argv[2]) / "hf")
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
import_(Path(sys.argv[3]), Path(sys.argv[2]) / "run")
imported = peak()
export(Path(sys.argv[2]) / "run", Path(sys.argv[2]) / "hf2")
print(imported - before, peak() - before)
"""


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """300 MB in float32; the largest leaf has 200 MB and the largest tensor 8 MB."""
    model = dataclasses.replace(
        models.tiny(),
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=5,
        moe=dataclasses.replace(models.tiny().moe, n_routed_experts=64, moe_intermediate_size=384),
    )
    make_run(tmp_path / "made", model)
    export(tmp_path / "made", tmp_path / "big")
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert size > 300e6
    words = [sys.executable, "-c", MEASURE, GOLDEN / "v2_tiny", tmp_path, tmp_path / "big"]
    out = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    print(out)
    imported, both = map(float, out.split())
    assert imported < 100
    assert both < 100
    assert contents(tmp_path / "big") == contents(tmp_path / "hf2")
