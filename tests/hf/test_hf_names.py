"""The table of names against the tensors of the released checkpoints, listed independently."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import GOLDEN

from configs import models
from dsv2_jax.hf import convert, load_params, to_hf_config
from dsv2_jax.hf.names import ROTATED_HALVES, tensors

V2 = {"d": 5120, "layers": 60, "heads": 128, "q": 1536, "experts": 160, "width": 1536, "dense": 12288}
LITE = {"d": 2048, "layers": 27, "heads": 16, "q": 0, "experts": 64, "width": 1408, "dense": 10944}


def released(d: int, layers: int, heads: int, q: int, experts: int, width: int, dense: int) -> dict[str, list[int]]:
    """Names and shapes of the tensors in the files of DeepSeek-V2 and V2-Lite."""

    def mlp(prefix: str, size: int) -> dict[str, list[int]]:
        return {
            f"{prefix}.gate_proj.weight": [size, d],
            f"{prefix}.up_proj.weight": [size, d],
            f"{prefix}.down_proj.weight": [d, size],
        }

    names = {"model.embed_tokens.weight": [102400, d], "model.norm.weight": [d], "lm_head.weight": [102400, d]}
    for layer in range(layers):
        p = f"model.layers.{layer}"
        names[f"{p}.input_layernorm.weight"] = names[f"{p}.post_attention_layernorm.weight"] = [d]
        if q:
            names[f"{p}.self_attn.q_a_proj.weight"] = [q, d]
            names[f"{p}.self_attn.q_a_layernorm.weight"] = [q]
            names[f"{p}.self_attn.q_b_proj.weight"] = [heads * 192, q]
        else:
            names[f"{p}.self_attn.q_proj.weight"] = [heads * 192, d]
        names[f"{p}.self_attn.kv_a_proj_with_mqa.weight"] = [576, d]
        names[f"{p}.self_attn.kv_a_layernorm.weight"] = [512]
        names[f"{p}.self_attn.kv_b_proj.weight"] = [heads * 256, 512]
        names[f"{p}.self_attn.o_proj.weight"] = [d, heads * 128]
        if layer == 0:
            names |= mlp(f"{p}.mlp", dense)
            continue
        names[f"{p}.mlp.gate.weight"] = [experts, d]
        names |= mlp(f"{p}.mlp.shared_experts", 2 * width)
        for expert in range(experts):
            names |= mlp(f"{p}.mlp.experts.{expert}", width)
    return names


def write_headers(folder: Path, shapes: dict[str, list[int]], files: int) -> None:
    """A bfloat16 checkpoint of sparse files: headers and index as released, no data."""
    weight_map = {}
    names = list(shapes)
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:06d}.safetensors"
        header, end = {}, 0
        for name in names[i::files]:
            size = 2 * int(np.prod(shapes[name], dtype=np.int64))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(("sizes", "preset"), [(V2, models.v2), (LITE, models.v2_lite)], ids=["v2", "v2_lite"])
def test_every_tensor_of_the_released_checkpoints_is_accepted(sizes, preset, tmp_path):
    shapes = released(**sizes)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(preset())))
    write_headers(tmp_path, shapes, files=7)
    _, found = convert.open_checked(tmp_path)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes
    assert {t.hf: list(t.shape) for t in tensors(preset())} == shapes


def test_each_wrong_tensor_is_named(tmp_path):
    shapes = released(**LITE)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(models.v2_lite())))
    shapes["model.layers.3.mlp.experts.5.up_proj.weight"] = [1408, 2047]
    shapes["model.layers.2.self_attn.q_proj.bias"] = [3072]
    del shapes["model.layers.26.mlp.gate.weight"], shapes["lm_head.weight"]
    write_headers(tmp_path, shapes, files=2)
    with pytest.raises(ValueError, match=r"does not match its config\.json") as error:
        convert.open_checked(tmp_path)
    message = str(error.value)
    assert "2 tensors (model.layers.26.mlp.gate.weight, lm_head.weight) missing" in message
    assert "1 tensor (model.layers.2.self_attn.q_proj.bias) not of this model" in message
    assert "1 tensor (model.layers.3.mlp.experts.5.up_proj.weight [1408, 2047] instead of [1408, 2048])" in message


def test_long_lists_of_wrong_tensors_are_cut(tmp_path):
    shapes = {name: shape for name, shape in released(**LITE).items() if "experts.9." not in name}
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(models.v2_lite())))
    write_headers(tmp_path, shapes, files=1)
    first = "model.layers.1.mlp.experts.9.gate_proj.weight, model.layers.2.mlp.experts.9.gate_proj.weight"
    with pytest.raises(ValueError, match=r"78 tensors \(.*, \.\.\.\) missing") as error:
        convert.open_checked(tmp_path)
    assert first in str(error.value)


def test_every_number_of_a_golden_checkpoint_lands_where_it_belongs():
    """v2_tiny: D 64, H 4, N 16, R 16, V 24, C 32, Q 40, E 16, F 24, X 48, I 112; layer 0 is dense."""
    hf = load_file(GOLDEN / "v2_tiny" / "model.safetensors")
    _, params = load_params(GOLDEN / "v2_tiny")
    params = {part: {name: np.asarray(leaf) for name, leaf in names.items()} for part, names in params.items()}
    dense, moe = params["dense"], params["moe"]

    def same(ours: np.ndarray, name: str, theirs: slice | np.ndarray) -> None:
        np.testing.assert_array_equal(ours, hf[name + ".weight"][theirs].T, err_msg=name)

    for layer in range(3):
        block, i = (dense, 0) if layer == 0 else (moe, layer - 1)
        p = f"model.layers.{layer}."
        same(block["norm_attention_D"][i], p + "input_layernorm", slice(None))
        same(block["norm_ffn_D"][i], p + "post_attention_layernorm", slice(None))
        same(block["norm_q_Q"][i], p + "self_attn.q_a_layernorm", slice(None))
        same(block["norm_kv_C"][i], p + "self_attn.kv_a_layernorm", slice(None))
        same(block["w_dq_DQ"][i], p + "self_attn.q_a_proj", slice(None))
        same(block["w_dkv_DC"][i], p + "self_attn.kv_a_proj_with_mqa", slice(0, 32))
        same(block["w_kr_DR"][i], p + "self_attn.kv_a_proj_with_mqa", slice(32, 48))
        for head in range(4):
            same(block["w_uq_QHN"][i][:, head], p + "self_attn.q_b_proj", slice(32 * head, 32 * head + 16))
            same(block["w_qr_QHR"][i][:, head], p + "self_attn.q_b_proj", slice(32 * head + 16, 32 * head + 32))
            same(block["w_uk_CHN"][i][:, head], p + "self_attn.kv_b_proj", slice(40 * head, 40 * head + 16))
            same(block["w_uv_CHV"][i][:, head], p + "self_attn.kv_b_proj", slice(40 * head + 16, 40 * head + 40))
            columns = hf[p + "self_attn.o_proj.weight"][:, 24 * head : 24 * head + 24]
            np.testing.assert_array_equal(block["w_o_HVD"][i][head], columns.T)
    for ours, theirs in (("w_gate_DI", "gate"), ("w_up_DI", "up"), ("w_down_ID", "down")):
        same(dense[ours][0], f"model.layers.0.mlp.{theirs}_proj", slice(None))
    for i in range(2):
        p = f"model.layers.{i + 1}.mlp."
        same(moe["w_router_DE"][i], p + "gate", slice(None))
        for ours, theirs in (("w_gate_DX", "gate"), ("w_up_DX", "up"), ("w_down_XD", "down")):
            same(moe[ours][i], f"{p}shared_experts.{theirs}_proj", slice(None))
        for expert in range(16):
            for ours, theirs in (("w_gate_EDF", "gate"), ("w_up_EDF", "up"), ("w_down_EFD", "down")):
                same(moe[ours][i][expert], f"{p}experts.{expert}.{theirs}_proj", slice(None))
    np.testing.assert_array_equal(params["embed"]["w_embed_WD"], hf["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"]["norm_D"], hf["model.norm.weight"])
    same(params["head"]["w_head_DW"], "lm_head", slice(None))


def test_llama_rotates_halves_and_we_rotate_pairs():
    w_dhr = np.arange(8.0).reshape(1, 2, 4)
    hf = ROTATED_HALVES.to_hf([w_dhr])
    assert hf.tolist() == [[0], [2], [1], [3], [4], [6], [5], [7]]
    np.testing.assert_array_equal(ROTATED_HALVES.from_hf(hf, [w_dhr.shape])[0], w_dhr)
