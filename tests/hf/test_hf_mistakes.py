"""Damaged folders and wrong commands: one sentence names the mistake, and no file is left over."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from folders import contents, tensors
from tiny import GOLDEN, give_tokenizer, make_run

from configs import models
from dsv2_jax import cli
from dsv2_jax.hf import __main__ as command
from dsv2_jax.hf import export, import_


@pytest.fixture
def golden(tmp_path):
    """A copy of a golden folder, to be spoilt."""
    shutil.copytree(GOLDEN / "v2_tiny", tmp_path / "hf")
    return tmp_path / "hf"


def refused(hf: Path, told: str) -> None:
    """Import refuses the folder with this sentence and leaves no files."""
    with pytest.raises(ValueError, match=told) as error:
        import_(hf, hf.parent / "out")
    assert "\n" not in str(error.value)
    assert not list(hf.parent.glob("out*"))


def test_truncated_data_is_refused_with_its_sizes(golden):
    path = golden / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(golden, f"is truncated: it has {len(whole) - 100} bytes of the {len(whole)} that its header describes")


def test_a_truncated_header_is_refused_with_its_sizes(golden):
    path = golden / "model.safetensors"
    ends = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:1000])
    refused(golden, f"is truncated: its header ends at byte {ends}, the file at 1000")
    path.write_bytes(b"abc")
    refused(golden, "is truncated: it has 3 bytes, fewer than a header")


def test_a_file_of_another_format_is_refused(golden):
    path = golden / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1 and more")
    refused(golden, "is not a safetensors file")
    path.write_bytes((16).to_bytes(8, "little") + b"not json not json" + bytes(100))
    refused(golden, "is damaged: invalid JSON")


def test_integers_are_refused(golden):
    path = golden / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    refused(golden, "has the dtype I32; supported: F32, BF16, F16")


def test_a_header_with_wrong_offsets_is_refused(golden):
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


def test_overlapping_tensors_are_refused(golden):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (golden / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(golden, "its tensors overlap or leave gaps")


def test_bytes_past_the_last_tensor_are_refused(golden):
    path = golden / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"12345")
    refused(golden, "5 more than its header describes")


def test_a_missing_shard_and_a_wrong_index_are_refused(golden, tmp_path):
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


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
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


def test_a_tokenizer_larger_than_the_model_is_refused(golden):
    give_tokenizer(golden)
    for file in (golden / "tokenizer").iterdir():
        file.rename(golden / file.name)
    refused(golden, "the tokenizer has [0-9]+ ids, more than the model's 160")
