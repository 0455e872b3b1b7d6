"""Whole folders out and in: to the byte, under transformers' and mlx-lm's eyes, in little memory, and with mistakes."""

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
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from configs import models
from dsv2_jax import cli
from dsv2_jax.config import Attention, Batch, Config, Model, Moe
from dsv2_jax.data import tokenizer
from dsv2_jax.hf import __main__ as command
from dsv2_jax.hf import export, import_, is_hf, load_params
from dsv2_jax.model import parameters
from dsv2_jax.training import checkpoint

GOLDEN = Path(__file__).parent / "golden"


def lite() -> Model:
    """No query compression, no groups, no YaRN."""
    return dataclasses.replace(
        models.tiny(),
        attention=dataclasses.replace(models.tiny().attention, q_lora_rank=0),
        rope=dataclasses.replace(models.tiny().rope, factor=1.0, original_max_position_embeddings=1024),
        moe=dataclasses.replace(models.tiny().moe, n_group=1, topk_group=1),
    )


def dense() -> Model:
    """Latent attention and no experts."""
    return dataclasses.replace(models.tiny(), first_k_dense_replace=0, moe=Moe(n_routed_experts=0))


def gqa() -> Model:
    """Grouped queries and no experts, with YaRN."""
    attention = Attention(
        kind="gqa",
        num_attention_heads=4,
        num_key_value_heads=2,
        q_lora_rank=0,
        kv_lora_rank=0,
        qk_nope_head_dim=0,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return dataclasses.replace(dense(), attention=attention)


MODELS = {"v2": models.tiny, "lite": lite, "dense": dense, "gqa": gqa}


def random_params(model: Model) -> dict:
    """Normal numbers that keep activations near 1; norms near 1."""
    rng = np.random.default_rng(0)

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        return 1 + 0.1 * values if name.startswith("norm") else 0.2 * values

    tree = parameters.tree(model)
    return {part: {name: leaf(name, shape) for name, shape in names.items()} for part, names in tree.items()}


def make_run(folder: Path, model: Model) -> dict:
    """A run's folder as training leaves it, and its parameters."""
    params = random_params(model)
    config = Config(workdir=folder, model=model, batch=Batch(size=4, length=32), tokens=10**6)
    checkpoint.save_params(folder, config, jax.tree.map(jax.numpy.asarray, params), step=7)
    return params


def give_tokenizer(run: Path) -> None:
    """A tokenizer of at most 512 ids, as a run's folder has it."""
    text = Path(transformers.__file__).read_text() + (Path(__file__).parent.parent / "pyproject.toml").read_text()
    tokenizer.train([text], 512, run / "tokenizer")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


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
    assert model.attention == checkpoint.read_config(run).model.attention
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
    config = checkpoint.read_config(tmp_path / "back")
    assert tokenizer.load(Path(config.data.tokenizer)).encode(text) == ours.encode(text)
    export(tmp_path / "back", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_tokenizer_larger_than_the_model_is_refused(golden):
    give_tokenizer(golden)
    for file in (golden / "tokenizer").iterdir():
        file.rename(golden / file.name)
    refused(golden, "the tokenizer has [0-9]+ ids and the model only 160")


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


@pytest.fixture
def golden(tmp_path):
    """A copy of a golden folder, to be spoilt."""
    shutil.copytree(GOLDEN / "v2_tiny", tmp_path / "hf")
    return tmp_path / "hf"


def refused(hf: Path, told: str) -> None:
    """Import refuses the folder with this sentence and leaves nothing behind."""
    with pytest.raises(ValueError, match=told) as error:
        import_(hf, hf.parent / "out")
    assert "\n" not in str(error.value)
    assert not list(hf.parent.glob("out*"))


def test_truncated_data_is_told_with_sizes(golden):
    path = golden / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(golden, f"is truncated: it has {len(whole) - 100} bytes of the {len(whole)} that its header describes")


def test_truncated_header_is_told_with_sizes(golden):
    path = golden / "model.safetensors"
    ends = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:1000])
    refused(golden, f"is truncated: its header ends at byte {ends}, the file at 1000")
    path.write_bytes(b"abc")
    refused(golden, "is truncated: it has 3 bytes and no whole header")


def test_what_is_no_safetensors_file_is_told(golden):
    path = golden / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1 and more")
    refused(golden, "is not a safetensors file")
    path.write_bytes((16).to_bytes(8, "little") + b"not json not json" + bytes(100))
    refused(golden, "no JSON where JSON should be")


def test_integers_are_refused(golden):
    path = golden / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    refused(golden, "is of dtype I32; F32, BF16, F16 can be read")


def test_a_header_that_lies_about_places_is_told(golden):
    path = golden / "model.safetensors"
    whole = path.read_bytes()
    for before, after, told in (
        (b'"shape":[64]', b'"shape":[-4]', "bad shape"),
        (b'"shape":[64]', b'"shape":[32]', r"has 256 bytes, but its shape \[32\] of F32 takes 128"),
        (b'"data_offsets":[0,', b'"data_offsets":[4,', "bytes, but its shape"),
    ):
        assert before in whole
        path.write_bytes(whole.replace(before, after, 1))
        refused(golden, told)


def test_bytes_past_the_end_are_told(golden):
    path = golden / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"12345")
    refused(golden, "5 more than its header describes")


def test_a_missing_shard_and_a_wrong_index_are_told(golden, tmp_path):
    make_run(tmp_path / "run", models.tiny())
    export(tmp_path / "run", tmp_path / "good", shard_bytes=50_000)
    index = json.loads((tmp_path / "good" / "model.safetensors.index.json").read_text())
    last = sorted(index["weight_map"].values())[-1]

    def spoil() -> Path:
        shutil.rmtree(golden)
        return Path(shutil.copytree(tmp_path / "good", golden))

    (spoil() / last).unlink()
    refused(golden, f"{last} is missing")
    index["weight_map"]["lm_head.bias"] = last
    (spoil() / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(golden, r"1 tensor \(lm_head.bias\) not in the file")
    del index["weight_map"]["lm_head.bias"], index["weight_map"]["model.norm.weight"]
    (spoil() / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(golden, r"1 tensor \(model.norm.weight\) in the files but not in")
    (spoil() / "config.json").unlink()
    refused(golden, "config.json is missing")


def test_export_refuses_a_folder_with_something_in_it(tmp_path):
    make_run(tmp_path / "run", models.tiny())
    (tmp_path / "hf").mkdir()
    export(tmp_path / "run", tmp_path / "hf")
    before = contents(tmp_path / "hf")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(tmp_path / "run", tmp_path / "hf")
    assert contents(tmp_path / "hf") == before


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    make_run(tmp_path / "run", models.tiny())
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 49'))
    with pytest.raises(ValueError, match=r"dense.w_gate_DI has the shape \[1, 32, 48\]; .* describes \[1, 32, 49\]"):
        export(tmp_path / "run", tmp_path / "hf")
    path.write_text(path.read_text().replace('"q_lora_rank": 24', '"q_lora_rank": 0'))
    with pytest.raises(ValueError, match=r"missing \['dense.w_qr_DHR', .*unknown \['dense.norm_q_Q'"):
        export(tmp_path / "run", tmp_path / "hf")


def run_command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hf", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main(command.main)
    return int(end.value.code or 0)


def test_command_line(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, "import", "--hf", GOLDEN / "v2_tiny", "--out", tmp_path / "run") == 0
    words = ("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "hf", "--dtype", "bfloat16")
    assert run_command(monkeypatch, *words) == 0
    assert {t.dtype for t in tensors(tmp_path / "hf").values()} == {torch.bfloat16}
    assert run_command(monkeypatch, "--help") == 0
    capsys.readouterr()
    for mistake, told in (
        (words, "is not an empty folder"),
        (("export", "--checkpoint", tmp_path / "nothing", "--out", tmp_path / "x"), "no run in"),
        (("import", "--hf", tmp_path / "nothing", "--out", tmp_path / "x"), "no Hugging Face folder in"),
        (("exprt",), "did you mean export?"),
        ((*words, "--dtyp", "float32"), "did you mean --dtype?"),
    ):
        assert run_command(monkeypatch, *mistake) == 2
        stderr = capsys.readouterr().err
        assert told in stderr
        assert len(stderr.strip().splitlines()) == 1


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
    """300 MB in float32 of which the largest leaf has 200 and the largest tensor 8."""
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
    out = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout
    print(out)
    imported, both = map(float, out.split())
    assert imported < 100
    assert both < 100
    assert contents(tmp_path / "big") == contents(tmp_path / "hf2")
