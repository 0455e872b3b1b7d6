"""The long-context stage shown: needles found and loss by position, before it, with plain interpolation and with YaRN.

Trains the nano of `make demo` on with rows of 512 tokens, most of which hold retrieval documents, extends it both ways,
with and without training on longer rows, and averages over seeds:

    python benchmarks/long_context.py [--seeds 0 1 2] [--json FILE] [--picture FILE.png]

What is finished is kept in --workdir, so several calls, for a seed each, may run beside each other before the last.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is where Python looks

from configs import PRESETS
from dsv2_jax import cli
from dsv2_jax.config import Config, Rope
from dsv2_jax.evaluation.needle import Needle
from dsv2_jax.inference.engine import Capacity, Engine

INTERPOLATION = {"kind": "linear", "mscale": 0.0, "mscale_all_dim": 0.0}  # and softmax is left as it was


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContext:
    """What is trained and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    init: Path = Path("runs/demo")
    base_steps: int = 1500  # of 2 x 512 tokens
    extension_steps: int = 300
    row: int = 4096  # tokens of the extension's rows
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 6144)  # of haystacks
    repeats: int = 4
    texts: int = 4  # rows of the longest length whose loss by position is read
    workdir: Path = Path("runs/long_context")
    json: Path | None = None
    picture: Path | None = None


def main() -> None:
    """Trains, measures, prints."""
    args = cli.parse(LongContext, prog="benchmarks/long_context.py")
    cli.keep_compiled_programs()
    args.workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        base = train(base_config(args, seed))
        asked: dict[str, tuple[Path, Rope | None]] = {"unextended": (base, None)}
        for name in ("interpolation", "yarn"):
            config = extended_config(args, seed, base, name)
            asked[f"{name}, untrained"] = base, config.model.rope
            asked[name] = train(config), None
        for name, (run, rope) in asked.items():
            kept = args.workdir / f"{name.replace(', ', '-')}-{seed}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measure(run, rope, args, seed)))
            found.setdefault(name, []).append(json.loads(kept.read_text()))
    means = {name: mean(figures) for name, figures in found.items()}
    show(means, args)
    if args.json is not None:
        args.json.write_text(json.dumps({"means": means, "seeds": found}, indent=2) + "\n")
    if args.picture is not None:
        draw(means, args, args.picture)


def base_config(args: LongContext, seed: int) -> Config:
    """Nano on rows of 512, most of them retrieval documents."""
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
    """The preset nano_long over the base; `interpolation` with all positions divided by the factor."""
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
    """Needles found and nats by position; the unextended model is asked beyond its positions too.

    rope: to read the same parameters with, in place of the run's own.
    """
    from dsv2_jax import loading
    from dsv2_jax.data import corpora
    from dsv2_jax.evaluation import needle

    loaded = loading.load(run)
    longest = max(args.lengths) + 64
    if rope is not None:
        positions = int(rope.factor * rope.original_max_position_embeddings)
        loaded = dataclasses.replace(
            loaded, model=dataclasses.replace(loaded.model, rope=rope, max_position_embeddings=positions)
        )
    if loaded.model.max_position_embeddings < longest:
        loaded = dataclasses.replace(loaded, model=beyond(loaded.model, longest))
    wanted = Needle(lengths=args.lengths, repeats=args.repeats, seed=seed)
    capacity = Capacity(rows=4, length=longest)
    figures = needle.evaluate(loaded, wanted, capacity, None)
    held_out = corpora.prepare(loaded.config.data).held_out
    words = loaded.need_tokenizer()
    text = "\n".join(held_out[i]["text"].decode() for i in range(len(held_out)))
    ids = words.encode(text)
    length = max(args.lengths)
    rows = [[words.bos_id, *ids[i * length : (i + 1) * length - 1]] for i in range(args.texts)]
    rows = [row for row in rows if len(row) == length]
    engine = Engine(loaded.params, loaded.model, capacity=capacity)
    pieces = max(1, length // 512)
    far = [part.mean() for part in np.array_split(nats(engine, rows), pieces, axis=1)]
    # Texts differ, so the same tokens are read once more, each piece as a row of its own.
    split = np.array_split(np.array(rows)[:, 1:], pieces, axis=1)
    near = [nats(engine, [[words.bos_id, *row] for row in piece.tolist()]).mean() for piece in split]
    return {"needle": figures, "nats_by_position": far, "nats_at_the_start": near}


def nats(engine: Engine, rows: list[list[int]]) -> np.ndarray:
    """[rows, tokens]: of every token behind a row's first."""
    return -np.array([[logprob for logprob, _ in result.scores] for result in engine.score(rows)])


def beyond(model: Any, positions: int) -> Any:
    """The same rotations at positions that the model was not made for: only its own limit is raised."""
    rope = dataclasses.replace(model.rope, original_max_position_embeddings=positions)
    assert model.rope.factor == Rope().factor, "only a model without YaRN turns alike with another original length"
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
    """Needles by length, perplexity in the last 512 tokens, and of the same text at the start of a row."""
    table = rich.table.Table("model", *[f"{n:,}" for n in args.lengths], "last 512", "as first 512")
    for name, m in means.items():
        found = [f"{100 * share:.0f}%" for share in m["needle_by_length"].values()]
        ends = [f"{math.exp(m[key][-1]):.1f}" for key in ("nats_by_position", "nats_at_the_start")]
        table.add_row(name, *found, *ends)
    rich.console.Console().print(table)


def draw(means: dict[str, Any], args: LongContext, path: Path) -> None:
    """Both in one figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, m in means.items():
        left.plot(args.lengths, list(m["needle_by_length"].values()), marker="o", label=name)
        more = np.array(m["nats_by_position"]) - np.array(m["nats_at_the_start"])
        right.plot(np.arange(1, len(more) + 1) * (max(args.lengths) / len(more)), np.exp(more), label=name)
    left.set(xlabel="tokens of context", ylabel="needles found", ylim=(-0.03, 1.03))
    right.set(xlabel="position", ylabel="perplexity, over the same text's at the start")
    for axes in (left, right):
        for learnt in (512, args.row):  # tokens of a row, before and in the stage
            axes.axvline(learnt, color="grey", linestyle=":")
        axes.legend()
    figure.suptitle(f"nano, mean of {len(args.seeds)} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.main(main)
