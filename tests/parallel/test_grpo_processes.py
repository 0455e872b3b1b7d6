"""GRPO in two processes: the samples and the bits of one, optimizer state on the host or not."""

import json

import pytest
from test_processes import finish, output, training

pytestmark = pytest.mark.slow

CLOCK = ("sampled_tokens_per_second", "seconds_sampling", "seconds_rewarding", "seconds_updating")


def lasting(lines):
    """What does not depend on the clock."""
    kept = [{name: x for name, x in line.items() if name not in CLOCK} for line in lines]
    return [line for line in kept if len(line) > 2]


def test_two_processes_draw_and_update_as_one(tmp_path):
    text, prompts = tmp_path / "text.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(f"User: pick {n}\n\nAssistant: {n % 10}" for n in range(900)))
    lines = [json.dumps({"prompt": f"pick {n}", "most_characters": 4}) for n in range(40)]
    prompts.write_text("\n".join(lines))
    data = ["--data.folder", str(tmp_path / "data"), "--model.moe.budget_sequences", "1"]
    base = ["--data.source", str(text), "--batch.size", "8", "--tokens", str(10 * 8 * 32)]
    finish(tmp_path / "base", [*data, *base, "--mesh.fsdp", "8"], 1, 8)
    flags = [
        *data, "--init", str(tmp_path / "base"), "--data.source", str(prompts), "--data.form", "prompts",
        "--data.held_out_fraction", "0.2", "--batch.size", "16", "--batch.length", "40", "--mesh.fsdp", "4",
        "--mesh.expert", "2", "--grpo.group", "4", "--grpo.prompts", "8", "--grpo.steps", "4", "--grpo.max_new", "4",
        "--grpo.rewards", "brevity", "--grpo.replay", "--cadence.evaluate", "2", "--cadence.save", "2",
    ]  # fmt: skip
    one = finish(tmp_path / "one", flags, 1, 8)
    two = finish(tmp_path / "two", [*flags, "--grpo.offload"], 2, 4)
    assert lasting(two) == lasting(one)
    assert max(line.get("sampler_gap_max", 0) for line in one) < 1e-4
    assert {line["router_disagreement"] for line in one if "router_disagreement" in line} == {0}
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    # A run that ended is found ended, by both.
    with training(tmp_path / "two", flags, 2, 4) as started:
        assert [process.wait(timeout=200) for process in started] == [0, 0], output(tmp_path / "two", 1)
