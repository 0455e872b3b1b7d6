"""The command that trains a preset: train.py or dsv2-train PRESET [--section.field VALUE ...]."""

import functools
import inspect
import sys

from dsv2_jax import cli, start
from dsv2_jax.presets import PRESETS, SETS


def main() -> int:
    """Reads the command line, trains, and says where everything is."""
    if not sys.argv[1:]:
        cli.fail(f"name a preset: {', '.join(PRESETS)}; --help says what they are")
    name, *flags = sys.argv[1:]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in PRESETS:
        cli.fail(f"unknown preset '{name}'{cli.nearest(name, PRESETS) or '; there are ' + ', '.join(PRESETS)}")
    prog = f"{cli.called('train.py')} {name}"
    config, lines = start.configure(PRESETS[name](), flags, SETS.get(name, ()), prog)

    from dsv2_jax.parallel import processes, xla  # here, so that mistakes and --help are answered at once
    from dsv2_jax.training import loop

    xla.choose()
    cli.keep_compiled_programs()
    cli.keep_freed_memory()
    with processes.joined(config.processes):
        if lines and processes.is_first():
            print("\n".join(lines), flush=True)
        if config.grpo.group:
            from dsv2_jax.alignment import grpo  # its rewards take seconds to import

            outcome = grpo.train(config)
        else:
            outcome = loop.train(config)
        first = processes.is_first()
    run = config.workdir
    if not outcome.finished:
        if first:
            print(f"stopped after step {outcome.progress.step:,} and saved; the same command goes on from there")
        return loop.STOPPED
    if not first:
        return 0
    print(f"checkpoint  {run / 'checkpoints' / str(outcome.progress.step)}")
    print(f"metrics     {run / 'metrics.jsonl'}")
    if config.grpo.group:
        print(f"samples     {run / 'samples.jsonl'}")
        print(f"plots       {run / 'plots'}")
        print(f"held out    {outcome.held_out['held_out_reward']:.4f} reward")
        return 0
    print(f"plots       {run / 'plots'}")
    if config.model.head == "score":
        print(f"held out    {outcome.held_out['held_out_accuracy']:.4f} accuracy")
        return 0
    print(f"held out    {outcome.held_out['held_out_bits_per_byte']:.4f} bits per byte")
    return 0


def usage() -> str:
    """How to call this, and the presets with what each is."""
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
