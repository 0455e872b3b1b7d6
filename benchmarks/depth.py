"""Measures the seconds to trace and compile a training step of 6 and of 60 layers, on eight virtual CPU devices.

    python benchmarks/depth.py [--rounds 3] [--json FILE]

The widths are those of the preset tiny; the mesh is fsdp 2 x expert 4. Rounds of both depths alternate, and the medians
are reported. Caches are cleared before each measurement.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX starts
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from configs import models  # noqa: E402
from dsv2_jax import cli  # noqa: E402
from dsv2_jax.config import Batch, Config, Mesh, check  # noqa: E402
from dsv2_jax.model import transformer  # noqa: E402
from dsv2_jax.parallel import mesh as device_mesh  # noqa: E402
from dsv2_jax.parallel import sharding  # noqa: E402
from dsv2_jax.training.step import create, state_specs, train_step  # noqa: E402

DEPTHS = 6, 60
ROWS, LENGTH = 8, 32
MESH = Mesh(fsdp=2, expert=4)
PHASES = "trace", "lower", "compile"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthBenchmark:
    """Measure the time to trace and compile a training step of 6 and of 60 layers."""

    rounds: int = 3  # of each depth
    json: Path | None = None  # write the figures to this file

    def __post_init__(self) -> None:
        check(self.rounds > 0, f"--rounds must be positive, not {self.rounds}")


def measure(layers: int) -> dict[str, float]:
    """Seconds of each phase for a step of `layers` layers."""
    tiny = models.tiny()
    moe = dataclasses.replace(tiny.moe, budget_sequences=MESH.expert)
    model = dataclasses.replace(tiny, num_hidden_layers=layers, moe=moe)
    batch = Batch(size=ROWS, length=LENGTH)
    config = Config(workdir=Path(), tokens=ROWS * LENGTH, model=model, batch=batch, mesh=MESH)
    devices = device_mesh.make(MESH)
    state = jax.eval_shape(lambda: create(transformer.init(model, jax.random.key(0)), config))
    state = jax.tree.map(
        lambda s, on: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on),
        state,
        sharding.on(devices, state_specs(config)),
    )
    names = dict.fromkeys(("tokens_BT", "targets_BT", "positions_BT", "segments_BT", "bytes_BT"), "int32")
    leaves = {
        name: jax.ShapeDtypeStruct((1, ROWS, LENGTH), dtype, sharding=sharding.on(devices, sharding.batch_spec(name)))
        for name, dtype in (names | {"weights_BT": "float32"}).items()
    }
    jax.clear_caches()
    moments = [time.perf_counter()]
    traced = train_step.trace(state, leaves, 1e-3, config=config, mesh=devices)
    moments.append(time.perf_counter())
    lowered = traced.lower()
    moments.append(time.perf_counter())
    lowered.compile()
    moments.append(time.perf_counter())
    return {phase: end - start for phase, start, end in zip(PHASES, moments, moments[1:], strict=False)}


def main() -> None:
    """Measures both depths in alternation and prints the medians and their ratio."""
    options = cli.parse(DepthBenchmark(), prog="depth.py")
    measure(DEPTHS[0])  # warms up parts that all programs share
    rounds = [{layers: measure(layers) for layers in DEPTHS} for _ in range(options.rounds)]
    seconds = {
        phase: [statistics.median(one[layers][phase] for one in rounds) for layers in DEPTHS] for phase in PHASES
    }
    table = rich.table.Table("seconds", *(f"{layers} layers" for layers in DEPTHS), "ratio")
    for phase, (few, many) in seconds.items():
        table.add_row(phase, f"{few:.2f}", f"{many:.2f}", f"{many / few:.2f}")
    rich.console.Console().print(table)
    if options.json:
        figures = {phase: dict(zip(map(str, DEPTHS), both, strict=True)) for phase, both in seconds.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.main(main)
