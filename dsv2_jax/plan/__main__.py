"""python -m dsv2_jax.plan PRESET --topology v5p:8x8x8 [--json FILE] [--hlo FILE.gz] [--section.field VALUE ...]."""

import dataclasses
import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from configs import PRESETS
from dsv2_jax import cli
from dsv2_jax.config import Config
from dsv2_jax.plan import report
from dsv2_jax.plan.compile import Topology, compiled, laid_out
from dsv2_jax.plan.estimate import Estimate, estimate
from dsv2_jax.plan.remedies import remedies

_USAGE = f"""usage: python -m dsv2_jax.plan PRESET --topology CHIP:XxYxZ [--json FILE] [--hlo FILE.gz]
       [--section.field VALUE ...]
Compiles the training step of a preset for TPUs that are not here, and says whether it fits and how long it takes.
presets: {", ".join(PRESETS)}; every flag of train.py may follow"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Config):
    """A training run, and the TPUs to plan it for."""

    topology: str = ""  # CHIP:XxYxZ, such as v5p:4x8x8 or v6e:16x16; of each slice, if there are several
    json: Path | None = None  # the figures, for a program
    hlo: Path | None = None  # the compiled, scheduled program, compressed by gzip


def main() -> int:
    """The command line."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0
    if name not in PRESETS:
        cli.fail(f"unknown preset '{name}'{cli.nearest(name, PRESETS) or '; there are ' + ', '.join(PRESETS)}")
    preset = PRESETS[name]()
    plan = cli.parse(Plan(**vars(preset)), flags, prog=f"python -m dsv2_jax.plan {name}")
    if not plan.topology:
        cli.fail("--topology is missing: CHIP:XxYxZ, such as v5p:4x8x8")
    topology = Topology(plan.topology)
    config = Config(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(Config)})
    if config.compute.dtype == "auto":  # what it is on a TPU
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))

    say = _progress()
    result, text = planned(config, topology, say)
    print(report.show(result))
    if plan.json:
        plan.json.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    if plan.hlo and text:
        with gzip.open(plan.hlo, "wt", compresslevel=3) as file:
            file.write(text)
    if not result.fits:
        m = result.memory
        cli.fail(
            f"{name} does not fit {topology.name}: a device needs {m.peak / 2**30:.2f} GiB and has "
            f"{m.size / 2**30:.2f}; " + remedies(config, topology, lambda c, t: planned(c, t, say)[0])
        )
    return 0


def planned(config: Config, topology: Topology, say: Callable[[str], None]) -> tuple[Estimate, str]:
    """The estimate of a config's step on a topology, and its HLO."""
    program, text = compiled(config, topology, say)
    return estimate(laid_out(config, topology), topology, program, text), text


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda text: print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.main(main)
