"""Command lines as a user types them: what is read, and that a mistake is one line and exit code 2."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import PRESETS
from dsv2_jax import cli


@dataclasses.dataclass(frozen=True)
class Needs:
    """A command with a flag that must be given."""

    checkpoint: Path  # a run's folder
    limit: int | None = None


def refusal(capsys, call) -> str:
    """The one line that the call printed before it ended with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_flags_override_the_preset():
    flags = ["--batch.size", "8", "--batch.micro-size=2", "--optimizer.decay_at", "0.5", "0.7", "--no-resume"]
    config = cli.parse(PRESETS["tiny"](), [*flags, "--workdir", "a/b", "--optimizer.peak-lr", "1"])
    assert (config.batch.size, config.batch.micro_size, config.resume) == (8, 2, False)
    assert (config.optimizer.decay_at, config.optimizer.peak_lr, config.workdir) == ((0.5, 0.7), 1.0, Path("a/b"))
    assert config.model == PRESETS["tiny"]().model
    assert isinstance(config.optimizer.peak_lr, float)


def test_every_flag_is_in_the_help_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(PRESETS["tiny"](), ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(flag.replace("_", "-") in text for flag in cli.flags(type(PRESETS["tiny"]())))
    assert "tokens per sequence" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch.siz 3", ["--batch.siz;", "did you mean --batch.size?"]),
        ("--batch.microsize=3", ["--batch.microsize;", "did you mean --batch.micro_size?"]),
        ("--peak_lr 3", ["--peak_lr;", "did you mean --optimizer.peak_lr?"]),
        ("--qqqq 3", ["unknown flag --qqqq", "--help"]),
        ("nano", ["unexpected argument 'nano'"]),
        ("--batch.size x", ["--batch.size takes INT", "'x' is not an integer"]),
        ("--batch.size 1.5", ["--batch.size takes INT", "'1.5' is not an integer"]),
        ("--optimizer.peak_lr high", ["--optimizer.peak-lr takes FLOAT", "'high' is not a number"]),
        ("--optimizer.weight_decay nan", ["--optimizer.weight-decay takes FLOAT", "'nan' is not finite"]),
        ("--optimizer.decay_at 0.1 inf", ["--optimizer.decay-at takes [FLOAT", "'inf'"]),
        ("--model.rope.theta 1e999", ["--model.rope.theta takes FLOAT", "'1e999' is not finite"]),
        ("--optimizer.decay_at 0.1 y", ["--optimizer.decay-at takes [FLOAT", "'y'"]),
        ("--batch.size", ["--batch.size"]),
        ("--compute.dtype half", ["--compute.dtype", "'half'", "'float32', 'bfloat16'"]),
        ("--batch.micro_size 3", ["error: batch.size (4) must be a multiple of batch.micro_size (3)\n"]),
        ("--tokens 1", ["error: tokens (1) is less than one batch of 4 x 32\n"]),
    ],
)
def test_mistakes_in_flags(capsys, flags, words):
    line = refusal(capsys, lambda: cli.parse(PRESETS["tiny"](), flags.split()))
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_a_flag_that_must_be_given(capsys):
    assert "--checkpoint" in refusal(capsys, lambda: cli.parse(Needs, []))
    assert "--limit takes" in refusal(capsys, lambda: cli.parse(Needs, ["--checkpoint", "x", "--limit", "y"]))
    assert cli.parse(Needs, ["--checkpoint", "x", "--limit", "3"]) == Needs(Path("x"), 3)


def test_exit_codes_of_a_command(capsys, tmp_path):
    def ends_with(function):
        with pytest.raises(SystemExit) as stop:
            cli.main(function)
        return stop.value.code

    assert (ends_with(lambda: None), ends_with(lambda: 75)) == (0, 75)

    def interrupted():
        raise KeyboardInterrupt

    assert ends_with(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
    missing = tmp_path / "not here"
    assert str(missing) in refusal(capsys, lambda: cli.main(lambda: print(missing.read_text())))
    line = refusal(capsys, lambda: cli.main(lambda: cli.parse(PRESETS["tiny"](), ["--seed", "-1"]) and None))
    assert line == "error: seed must be at least 0, not -1\n"


def test_a_check_of_ours_is_a_mistake_and_a_librarys_error_a_failure(capsys):
    def ours():
        dataclasses.replace(PRESETS["tiny"](), seed=-1)

    assert refusal(capsys, lambda: cli.main(ours)) == "error: seed must be at least 0, not -1\n"
    with pytest.raises(json.JSONDecodeError):
        cli.main(lambda: json.loads("{"))


def test_presets_are_named(capsys, monkeypatch):
    from dsv2_jax import train

    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    assert train.main() == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in PRESETS)
    assert "DeepSeek-V2-Lite, 15.7B" in text
    for argv, words in (
        (["nanoo"], "did you mean nano?"),
        (["zzzz"], "there are nano, v2_lite"),
        ([], "name a preset"),
    ):
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        assert words in refusal(capsys, train.main)
