"""The report of GRPO on artificial runs: the figures that it prints, the answers that it shows, its picture."""

import json

import pytest

from dsv2_jax.alignment import report


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    """Fine-tuning, a reward model and two policies: one solves a question more in the end, the other two."""
    for name, last in (("grpo-0", 2), ("grpo-1", 3)):
        run = tmp_path / name
        steps = [
            {"step": 1 + i, "reward": 0.1 * i, "kl": 0.01 * i, "response_tokens": 3.0, "entropy": 1.0} for i in range(3)
        ]
        for step, right in ((0, 1), (3, last)):
            answers = [
                {"step": step, "prompt": f"{n} | 1\nis", "response": str(n), "rewards": {"task": float(n < right)}}
                for n in range(4)
            ]
            with (run / "held_out.jsonl").open("a") if step else _fresh(run / "held_out.jsonl") as file:
                file.writelines(json.dumps(line) + "\n" for line in answers)
            steps.append(
                {
                    "step": step,
                    "held_out_reward": right / 4,
                    "held_out_solved": right / 4,
                    "held_out_solved_aiw": 0.5,
                    "held_out_solved_gcd": right / 4,
                }
            )
        write_lines(run / "metrics.jsonl", steps)
    scored = {"step": 9, "held_out_whole": True, "held_out_accuracy": 0.75, "held_out_preferences": 40}
    write_lines(tmp_path / "reward" / "metrics.jsonl", [scored])
    for name in ("sft", "reward", "grpo-0", "grpo-1"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / report.SECONDS).write_text("90.0")
    return tmp_path


def _fresh(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w")


def test_figures_answers_and_a_picture(runs):
    text = report.write(runs, runs / "sft", runs / "reward", [runs / "grpo-0", runs / "grpo-1"])
    assert (runs / "report.md").read_text() == text
    assert "| all | 25.0 | 62.5 | 50.0, 75.0 | +37.5 (+25.0 to +50.0) |" in text
    assert "| gcd | 25.0 | 62.5 |" in text
    assert "| mean of the tasks | 37.5 | 56.2 | 50.0, 62.5 | +18.8 (+12.5 to +25.0) |" in text
    assert "75.0% of 40 held-out pairs" in text
    assert "grpo-1 1.5" in text
    assert "| 1 \\| 1 is | 1 ✗ | 1 ✓ |" in text and "| 3 \\| 1 is | 3 ✗ | 3 ✗ |" in text
    assert (runs / "grpo.png").stat().st_size > 10_000
