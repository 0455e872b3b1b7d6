"""python -m dsv2_jax.plan PRESET --topology v5p:8x8x8 [--json FILE] [--hlo FILE.gz] [--section.field VALUE ...]."""

import dataclasses
import functools
import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsv2_jax import cli
from dsv2_jax.config import Config, check
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.ops import switch
from dsv2_jax.plan import claims, grpo, largest, page, report, search
from dsv2_jax.plan.compile import Topology, compiled, laid_out
from dsv2_jax.plan.estimate import Estimate, estimate
from dsv2_jax.plan.program import Work
from dsv2_jax.plan.remedies import remedies
from dsv2_jax.presets import PRESETS, layouts

_CALLED = cli.called("python -m dsv2_jax.plan")
_USAGE = f"""usage: {_CALLED} PRESET --topology CHIP:XxYxZ [--forward | --decode | --search] [--json FILE]
       [--hlo FILE.gz] [--html FILE] [--section.field VALUE ...]
       {_CALLED} claims [--topology CHIP:XxYxZ] [--serving CHIP:XxYxZ] [--json FILE]
Compiles a preset's training step for TPUs that are not here, or its forward pass, or a decode step of its engine; says
if it fits and what it takes. Of a preset of GRPO, an iteration: weights prepared, responses sampled, an update.
presets: {", ".join(PRESETS)}; every flag of train.py may follow"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Config):
    """A training run or an engine, and the TPUs to plan it for."""

    topology: str = ""  # CHIP:XxYxZ, such as v5p:4x8x8 or v6e:16x16; of each slice, if there are several
    json: Path | None = None  # the figures, for a program
    hlo: Path | None = None  # the compiled, scheduled program, compressed by gzip
    html: Path | None = None  # a page with pictures
    forward: bool = False  # plan the forward pass of a batch, as of evaluation or a prefill, instead of a step
    decode: bool = False  # plan a decode step of the engine: all its rows full, each `capacity.length` tokens long
    capacity: Capacity = dataclasses.field(default_factory=Capacity)  # of the engine, for --decode
    largest: bool = False  # with --decode: as many rows as fit, found by compiling
    search: bool = False  # try meshes and remat policies, compile the most promising, rank them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """The paper's claims beside this code base."""

    topology: str = "v5p:4x8x8"  # that training is compiled for
    serving: str = "v5p:2x2x2"  # that generation is compiled for
    compile: bool = True  # --no-compile: only what can be counted at once
    json: Path | None = None  # the table, for a program


def main() -> int:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here; there is no TPU to look for
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0
    say = _progress()
    if name == "claims":
        options = cli.parse(Claims, flags, prog=f"{_CALLED} claims")
        compiles = (lambda c, t, work: planned(c, t, say, work)[0]) if options.compile else None
        rows = claims.claims(Topology(options.topology), Topology(options.serving), compiles)
        print(claims.show(rows))
        _write(options.json, [dataclasses.asdict(row) for row in rows])
        return 0
    if name not in PRESETS:
        cli.fail(f"unknown preset '{name}'{cli.nearest(name, PRESETS) or '; there are ' + ', '.join(PRESETS)}")
    plan = _parsed(name, flags)
    topology = Topology(plan.topology)
    config = Config(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(Config)})
    work = _work(plan)
    if plan.search:
        check(work == "step", "--search compares training steps: leave out --forward and --decode")
        results = search.search(config, topology, lambda c, t: planned(c, t, say)[0])
        print(search.show(results))
        _write(plan.json, [dataclasses.asdict(result) for result in results])
        return 0
    if plan.largest:
        check(isinstance(work, Capacity), "--largest is for a decode step: add --decode")
        assert isinstance(work, Capacity)
        work, _ = largest.largest(config, topology, work, lambda c, t, w: planned(c, t, say, w)[0])
    if config.grpo.group and work == "step":
        return _grpo(name, plan, config, topology)
    result, text = planned(config, topology, say, work)
    print(report.show(result))
    _write(plan.json, dataclasses.asdict(result))
    if plan.html:
        plan.html.write_text(page.page(name, result), encoding="utf-8")
    if plan.hlo and text:
        with gzip.open(plan.hlo, "wt", compresslevel=3) as file:
            file.write(text)
    if not result.fits:
        m = result.memory
        cli.fail(
            f"{name} does not fit {topology.name}: a device needs {m.peak / 2**30:.2f} GiB and has "
            f"{m.size / 2**30:.2f}; " + remedies(config, topology, lambda c, t, w: planned(c, t, say, w)[0], work)
        )
    return 0


def _grpo(name: str, plan: Plan, config: Config, topology: Topology) -> int:
    check(not (plan.html or plan.hlo), "--html and --hlo are of one program, and an iteration of GRPO has several")
    say = _progress()
    found = grpo.iteration(config, topology, lambda c, t, w: planned(c, t, say, w)[0])
    print(grpo.show(found))
    _write(plan.json, grpo.figures(found))
    if not found.fits:
        worst = max(found.phases, key=lambda phase: phase.peak)
        cli.fail(
            f"{name} does not fit {topology.name}: {worst.name} needs {worst.peak / 2**30:.2f} GiB of a device's "
            f"{found.size / 2**30:.2f}; --mesh.expert splits the sampler's weights, --grpo.offload and a smaller "
            "--batch.micro_size save most of the rest"
        )
    return 0


def _parsed(name: str, flags: list[str]) -> Plan:
    """The flags over the preset, in its layout for the topology if one is listed."""
    prog = f"{_CALLED} {name}"
    wanted = cli.parse(Plan(**vars(PRESETS[name]())), flags, prog=prog)
    if not wanted.topology:
        cli.fail("--topology is missing: CHIP:XxYxZ, such as v5p:4x8x8")
    config, capacity = layouts.on_topology(name, wanted.topology), Capacity()
    serving = layouts.SERVING.get((name, wanted.topology))
    if wanted.decode and serving is not None:
        config, capacity = dataclasses.replace(config, mesh=serving.mesh), serving.capacity
    return cli.parse(Plan(**vars(config), capacity=capacity), flags, prog=prog)


def _work(plan: Plan) -> Work:
    check(not (plan.forward and plan.decode), "--forward and --decode plan different programs: leave one out")
    if plan.decode:
        return plan.capacity.resolve(plan.model, switch.implementation(plan.compute, Topology(plan.topology).kind))
    return "forward" if plan.forward else "step"


def _write(path: Path | None, figures: Any) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def planned(
    config: Config, topology: Topology, say: Callable[[str], None], work: Work = "step"
) -> tuple[Estimate, str]:
    """The estimate of a config's work on a topology, and the program's HLO."""
    program, text = compiled(config, topology, say, work)
    return estimate(laid_out(config, topology, work), topology, program, text, say, work), text


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda text: print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
