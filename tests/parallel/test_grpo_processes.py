"""GRPO in two processes: samples and bits of one process, with and without offloading; SIGTERM."""

import json
import signal

import pytest
from test_processes import disturb, finish, output, training

from dsv2_jax.training import loop, run_folder

pytestmark = pytest.mark.slow

CLOCK = ("sampled_tokens_per_second", "seconds_sampling", "seconds_rewarding", "seconds_updating")


def lasting(lines):
    """What does not depend on the clock."""
    kept = [{name: x for name, x in line.items() if name not in CLOCK} for line in lines]
    return [line for line in kept if len(line) > 2]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A base model of a little text, and GRPO on it: two optimizer steps an iteration."""
    folder = tmp_path_factory.mktemp("grpo")
    text, prompts = folder / "text.txt", folder / "prompts.jsonl"
    text.write_text("\n".join(f"User: pick {n}\n\nAssistant: {n % 10}" for n in range(900)))
    lines = [json.dumps({"prompt": f"pick {n}", "most_characters": 7}) for n in range(40)]
    prompts.write_text("\n".join(lines))
    data = ["--data.folder", str(folder / "data"), "--model.moe.budget_sequences", "1"]
    base = ["--data.source", str(text), "--batch.size", "8", "--tokens", str(10 * 8 * 32)]
    finish(folder / "base", [*data, *base, "--mesh.fsdp", "8"], 1, 8)
    return [
        *data, "--init", str(folder / "base"), "--data.source", str(prompts), "--data.form", "prompts",
        "--data.held_out_fraction", "0.2", "--batch.size", "16", "--batch.length", "40", "--mesh.fsdp", "4",
        "--mesh.expert", "2", "--grpo.group", "4", "--grpo.prompts", "8", "--grpo.max_new", "4",
        "--grpo.rewards", "brevity", "--grpo.replay", "--cadence.evaluate", "2", "--cadence.save", "2",
    ]  # fmt: skip


def test_two_processes_draw_and_update_as_one(tmp_path, flags):
    flags = [*flags, "--grpo.steps", "4"]
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


def test_both_processes_stop_at_sigterm_between_iterations_of_two_steps(tmp_path, flags):
    run = tmp_path / "run"
    codes, _ = disturb(run, [*flags, "--grpo.steps", "1000", "--cadence.evaluate", "1000"], 1, signal.SIGTERM, 4)
    assert codes == [loop.STOPPED] * 2, output(run, 0)
    stopped = run_folder.latest_step(run)
    assert stopped % 2 == 0 and 4 <= stopped < 100
