"""Loads a Hugging Face checkpoint of full size without its weights: python benchmarks/dry_run.py v2_lite.

Writes a Hugging Face folder of the preset's shapes, with sparse files that take no disk space. Opens it with the usual
checks, reads it matrix by matrix into 8 bits, and scores a few tokens with the engine. All weights are zero, so every
logit is zero and each token must have the log-probability -ln(vocabulary).
"""

import dataclasses
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.console
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python searches the script's own folder only

from configs import PRESETS
from dsv2_jax import cli
from dsv2_jax.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """Load a checkpoint of full size without its weights."""

    preset: Annotated[str, tyro.conf.Positional] = "v2_lite"
    only_open: bool = False  # check every header and shape but read no weights, so that V2 fits in memory
    folder: Path | None = None  # for the sparse files; by default a temporary folder
    json: Path | None = None


def main() -> None:
    """Writes, opens, reads and runs the checkpoint, and prints the figures."""
    args = cli.parse(DryRun, prog="benchmarks/dry_run.py")
    check(args.preset in PRESETS, f"unknown preset '{args.preset}'{cli.nearest(args.preset, PRESETS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        figures = rehearse(args, folder)
    for name, value in figures.items():
        rich.console.Console().print(f"{name:26} {value}", highlight=False)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def rehearse(args: DryRun, folder: Path) -> dict[str, float | int]:
    """The figures by name."""
    import jax.numpy as jnp

    from dsv2_jax import hf, loading
    from dsv2_jax.hf import convert, files
    from dsv2_jax.hf.names import tensors
    from dsv2_jax.inference.engine import Capacity, Engine

    model = PRESETS[args.preset]().model
    files.create(folder, {t.hf: t.shape for t in tensors(model)}, np.dtype(jnp.bfloat16), 5 * 10**9)
    (folder / "config.json").write_text(json.dumps(hf.to_hf_config(model)))
    _, found = convert.open_checked(folder)
    shards = list(folder.glob("*.safetensors"))
    figures: dict[str, float | int] = {
        "tensors": len(found),
        "bytes of the files": sum(f.stat().st_size for f in shards),
        "bytes on disk": sum(512 * f.stat().st_blocks for f in shards),
    }
    if args.only_open:
        return figures
    start = time.perf_counter()
    loaded = loading.load_for_engine(folder, weights="int8")
    figures["seconds to read"] = round(time.perf_counter() - start, 1)
    capacity = Capacity(rows=1, length=128, chunk=64, weights="int8", cache="int8")
    engine = Engine(loaded.params, loaded.model, capacity=capacity)
    start = time.perf_counter()
    (result,) = engine.score([[0, 5, 100, 1000, 10_000]])
    figures["seconds to score 4 tokens"] = round(time.perf_counter() - start, 1)
    figures["bytes of the weights"] = engine.weight_bytes
    figures["peak bytes of the process"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worst = max(abs(logprob + math.log(model.vocab_size)) for logprob, _ in result.scores)
    assert worst < 1e-4, f"log-probabilities of zero weights are off by {worst}"
    return figures


if __name__ == "__main__":
    cli.main(main)
