"""Measures context extension: needles found and loss by position, before it, with linear interpolation and with YaRN.

Continues to train the nano of `make demo` on rows of 512 tokens, most of them retrieval documents. Extends it both
ways, with and without training on longer rows, and averages over seeds:

    python benchmarks/long_context.py [--seeds 0 1 2] [--json FILE] [--picture FILE.png]

--workdir keeps finished results, so calls with one seed each may run in parallel before a final call with all seeds.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python searches the script's own folder only

from configs import PRESETS
from dsv2_jax import cli
from dsv2_jax.config import Config, Rope
from dsv2_jax.evaluation.needle import Needle
from dsv2_jax.inference.engine import Capacity, Engine

INTERPOLATION = {"kind": "linear", "mscale": 0.0, "mscale_all_dim": 0.0}  # the softmax scale stays


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContext:
    """Measure context extension on a nano model."""

    seeds: tuple[int, ...] = (0, 1, 2)
    init: Path = Path("runs/demo")
    base_steps: int = 1500  # of 2 x 512 tokens
    extension_steps: int = 300
    row: int = 4096  # tokens of the extension's rows
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 6144)  # of haystacks
    repeats: int = 4
    texts: int = 4  # rows of the longest length for the loss by position
    workdir: Path = Path("runs/long_context")
    json: Path | None = None
    picture: Path | None = None


def main() -> None:
    """Trains, measures and prints."""
    args = cli.parse(LongContext, prog="benchmarks/long_context.py")
    cli.keep_compiled_programs()
    args.workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        base = train(base_config(args, seed))
        variants: dict[str, tuple[Path, Rope | None]] = {"unextended": (base, None)}
        for name in ("interpolation", "yarn"):
            config = extended_config(args, seed, base, name)
            variants[f"{name}, untrained"] = base, config.model.rope
            variants[name] = train(config), None
        for name, (run, rope) in variants.items():
            file = args.workdir / f"{name.replace(', ', '-')}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(measure(run, rope, args, seed)))
            found.setdefault(name, []).append(json.loads(file.read_text()))
    means = {name: mean(figures) for name, figures in found.items()}
    show(means, args)
    if args.json is not None:
        args.json.write_text(json.dumps({"means": means, "seeds": found}, indent=2) + "\n")
    if args.picture is not None:
        draw(means, args, args.picture)


def base_config(args: LongContext, seed: int) -> Config:
    """Nano on rows of 512 tokens, most of them retrieval documents."""
    nano = PRESETS["nano"]()
    return dataclasses.replace(
        nano,
        seed=seed,
        init=args.init,
        workdir=args.workdir / f"base-{seed}",
        tokens=args.base_steps * 2 * 512,
        batch=dataclasses.replace(nano.batch, size=2, length=512),
        data=PRESETS["nano_long"]().data,
        optimizer=dataclasses.replace(nano.optimizer, peak_lr=1e-3, decay_at=(0.8,)),
    )


def extended_config(args: LongContext, seed: int, base: Path, name: str) -> Config:
    """The preset nano_long on top of the base. `interpolation` divides all positions by the factor."""
    preset = PRESETS["nano_long"]()
    rope = preset.model.rope if name == "yarn" else dataclasses.replace(preset.model.rope, **INTERPOLATION)
    return dataclasses.replace(
        preset,
        seed=seed,
        init=base,
        workdir=args.workdir / f"{name}-{seed}",
        model=dataclasses.replace(preset.model, rope=rope),
        batch=dataclasses.replace(preset.batch, length=args.row),
        tokens=args.extension_steps * preset.batch.size * args.row,
    )


def train(config: Config) -> Path:
    """The run's folder, once it is finished; SIGTERM ends the benchmark."""
    from dsv2_jax import train as command
    from dsv2_jax.training import loop

    if not command.train(config).finished:
        sys.exit(loop.STOPPED)
    return config.workdir


def measure(run: Path, rope: Rope | None, args: LongContext, seed: int) -> dict[str, Any]:
    """Needles found and loss in nats by position, also beyond the positions of a model that is not extended.

    rope: replaces the run's own settings.
    """
    from dsv2_jax import loading
    from dsv2_jax.data import corpora
    from dsv2_jax.evaluation import needle

    loaded = loading.load(run)
    max_length = max(args.lengths) + 64
    if rope is not None:
        positions = int(rope.factor * rope.original_max_position_embeddings)
        loaded = dataclasses.replace(
            loaded, model=dataclasses.replace(loaded.model, rope=rope, max_position_embeddings=positions)
        )
    if loaded.model.max_position_embeddings < max_length:
        loaded = dataclasses.replace(loaded, model=beyond(loaded.model, max_length))
    wanted = Needle(lengths=args.lengths, repeats=args.repeats, seed=seed)
    capacity = Capacity(rows=4, length=max_length)
    figures = needle.evaluate(loaded, wanted, capacity, None)
    held_out = corpora.prepare(loaded.config.data).held_out
    tokenizer = loaded.need_tokenizer()
    text = "\n".join(held_out[i]["text"].decode() for i in range(len(held_out)))
    ids = tokenizer.encode(text)
    length = max(args.lengths)
    rows = [[tokenizer.bos_id, *ids[i * length : (i + 1) * length - 1]] for i in range(args.texts)]
    rows = [row for row in rows if len(row) == length]
    engine = Engine(loaded.params, loaded.model, capacity=capacity)
    pieces = max(1, length // 512)
    far = [part.mean() for part in np.array_split(nats(engine, rows), pieces, axis=1)]
    # Texts differ in difficulty, so the same pieces are scored again, each at the start of its own row.
    split = np.array_split(np.array(rows)[:, 1:], pieces, axis=1)
    near = [nats(engine, [[tokenizer.bos_id, *row] for row in piece.tolist()]).mean() for piece in split]
    return {"needle": figures, "nats_by_position": far, "nats_at_the_start": near}


def nats(engine: Engine, rows: list[list[int]]) -> np.ndarray:
    """Loss of every token after a row's first, [rows, tokens]."""
    return -np.array([[logprob for logprob, _ in result.scores] for result in engine.score(rows)])


def beyond(model: Any, positions: int) -> Any:
    """The model with a raised limit of positions, and the same rotations."""
    rope = dataclasses.replace(model.rope, original_max_position_embeddings=positions)
    assert model.rope.factor == Rope().factor, (
        "only a model without YaRN keeps its rotations with another original length"
    )
    return dataclasses.replace(model, max_position_embeddings=positions, rope=rope)


def mean(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds."""
    lengths = figures[0]["needle"]["by_length"]
    return {
        "needle_by_length": {n: float(np.mean([f["needle"]["by_length"][n] for f in figures])) for n in lengths},
        **{
            key: np.mean([f[key] for f in figures], axis=0).tolist()
            for key in ("nats_by_position", "nats_at_the_start")
        },
    }


def show(means: dict[str, Any], args: LongContext) -> None:
    """Prints needles by length, and the perplexity of the last 512 tokens there and at the start of a row."""
    table = rich.table.Table("model", *[f"{n:,}" for n in args.lengths], "last 512", "as first 512")
    for name, m in means.items():
        found = [f"{100 * share:.0f}%" for share in m["needle_by_length"].values()]
        ends = [f"{math.exp(m[key][-1]):.1f}" for key in ("nats_by_position", "nats_at_the_start")]
        table.add_row(name, *found, *ends)
    rich.console.Console().print(table)


def draw(means: dict[str, Any], args: LongContext, path: Path) -> None:
    """Draws needles by length and loss by position in one figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, m in means.items():
        left.plot(args.lengths, list(m["needle_by_length"].values()), marker="o", label=name)
        excess = np.array(m["nats_by_position"]) - np.array(m["nats_at_the_start"])
        right.plot(np.arange(1, len(excess) + 1) * (max(args.lengths) / len(excess)), np.exp(excess), label=name)
    left.set(xlabel="tokens of context", ylabel="needles found", ylim=(-0.03, 1.03))
    right.set(xlabel="position", ylabel="perplexity, relative to the start of a row")
    for axes in (left, right):
        for trained in (512, args.row):  # tokens of a row, before and in the stage
            axes.axvline(trained, color="grey", linestyle=":")
        axes.legend()
    figure.suptitle(f"nano, mean of {len(args.seeds)} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.main(main)
