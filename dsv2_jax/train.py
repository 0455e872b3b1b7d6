"""The command that trains a preset: train.py or dsv2-train PRESET [--section.field VALUE ...]."""

import functools
import inspect
import sys
from typing import TYPE_CHECKING

from dsv2_jax import cli, start
from dsv2_jax.config import Config, check
from dsv2_jax.presets import PRESETS, SETS

if TYPE_CHECKING:
    from dsv2_jax.training.stage import Ended


def main() -> int:
    """Reads the command line, trains, and prints where the results are."""
    if not sys.argv[1:]:
        cli.fail(f"name a preset: {', '.join(PRESETS)}; --help describes them")
    name, *flags = sys.argv[1:]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in PRESETS:
        cli.fail(f"unknown preset '{name}'{cli.nearest(name, PRESETS) or '; there are ' + ', '.join(PRESETS)}")
    prog = f"{cli.called('train.py')} {name}"
    config, lines = start.configure(PRESETS[name](), flags, SETS.get(name, ()), prog)

    from dsv2_jax.parallel import processes, xla  # imported here so that mistakes and --help are answered at once
    from dsv2_jax.training import loop

    xla.choose()
    cli.keep_compiled_programs()
    cli.keep_freed_memory()
    with processes.joined(config.processes):
        if lines and processes.is_first():
            print("\n".join(lines), flush=True)
        ended = train(config)
        if processes.is_first():
            print("\n".join(ended.lines()))
    return 0 if ended.finished else loop.STOPPED


def train(config: Config) -> "Ended":
    """Trains the stage that the config describes: GRPO if `grpo.group` is set, else the stage of `data.form`.

    Raises ValueError if only one of model and data is a reward model's, and as the stage does.
    """
    if config.grpo.group:
        from dsv2_jax.alignment import grpo  # its rewards take seconds to import

        return grpo.train(config)
    from dsv2_jax import pretraining
    from dsv2_jax.alignment import reward, sft
    from dsv2_jax.training import loop

    check(
        (config.model.head == "score") == (config.data.form == "preferences"),
        "a reward model needs both model.head score and data.form preferences; only one of them is set",
    )
    stages = {"conversations": sft.STAGE, "preferences": reward.STAGE}
    return loop.train(config, stages.get(config.data.form, pretraining.STAGE))


def usage() -> str:
    """The usage text: the command line, and every preset with its first line."""
    width = max(map(len, PRESETS))
    called = cli.called("python train.py")
    presets = "\n".join(f"  {name:{width}}  {(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in PRESETS.items())
    return (
        f"usage: {called} PRESET [--section.field VALUE ...]\n\n"
        f"presets:\n{presets}\n\n"
        f"{called} PRESET --help lists every flag. A run found in --workdir is resumed."
    )


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
