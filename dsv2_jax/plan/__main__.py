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
from dsv2_jax.plan import claims, fit, report
from dsv2_jax.plan.compile import Topology, compiled, laid_out
from dsv2_jax.plan.estimate import Estimate, Planner, estimate
from dsv2_jax.plan.program import Work
from dsv2_jax.presets import PRESETS, layouts

_CALLED = cli.called("python -m dsv2_jax.plan")
_USAGE = f"""usage: {_CALLED} PRESET --topology CHIP:XxYxZ [--forward | --decode [--max-rows] | --search]
       [--json FILE] [--hlo FILE.gz] [--html FILE] [--section.field VALUE ...]
       {_CALLED} claims [--topology CHIP:XxYxZ] [--serving CHIP:XxYxZ] [--json FILE]
Compiles a preset's training step for TPUs that are not attached, and estimates its memory and time. --forward plans the
forward pass, --decode a decode step of the engine. A GRPO preset is planned as an iteration: preparing the sampler's
weights, sampling and updating.
presets: {", ".join(PRESETS)}; all flags of train.py are accepted"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Config):
    """A training run or an engine, and the TPUs to plan it for."""

    topology: str = ""  # CHIP:XxYxZ, such as v5p:4x8x8 or v6e:16x16; of each slice, if there are several
    json: Path | None = None  # file for the figures as JSON
    hlo: Path | None = None  # file for the compiled, scheduled HLO, compressed by gzip
    html: Path | None = None  # file for the report as a page with charts
    forward: bool = False  # plan the forward pass of a batch, as in evaluation or a prefill, instead of a step
    decode: bool = False  # plan a decode step of the engine with all rows in use, each `capacity.length` tokens long
    capacity: Capacity = dataclasses.field(default_factory=Capacity)  # of the engine, for --decode
    max_rows: bool = False  # with --decode: find the maximum number of rows that fit, by compiling
    search: bool = False  # rank meshes and remat policies: compile those that arithmetic estimates to be fastest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """The paper's claims compared with this code."""

    topology: str = "v5p:4x8x8"  # for training
    serving: str = "v5p:2x2x2"  # for generation
    compile: bool = True  # --no-compile leaves the rows that need compilation pending
    json: Path | None = None  # file for the table as JSON


def main() -> int:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # libtpu only compiles: do not search for TPUs
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE)
        return 0
    say = _progress()

    def plan(config: Config, topology: Topology, work: Work) -> Estimate:
        return planned(config, topology, say, work)[0]

    if name == "claims":
        _claims(flags, plan)
        return 0
    if name not in PRESETS:
        cli.fail(f"unknown preset '{name}'{cli.nearest(name, PRESETS) or '; there are ' + ', '.join(PRESETS)}")
    options = _parsed(name, flags)
    topology = Topology(options.topology)
    config = Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})
    work = _work(options)
    if options.search:
        check(work == "step", "--search compares training steps: leave out --forward and --decode")
        results = fit.search(config, topology, plan)
        print(report.ranking(results))
        _write(options.json, [dataclasses.asdict(result) for result in results])
        return 0
    if options.max_rows:
        check(isinstance(work, Capacity), "--max-rows is for a decode step: add --decode")
        assert isinstance(work, Capacity)
        work, _ = fit.max_rows(config, topology, work, plan)
    if config.grpo.group and work == "step":
        _grpo(name, options, config, topology, plan)
        return 0
    result, text = planned(config, topology, say, work)
    print(report.table(result))
    _write(options.json, dataclasses.asdict(result))
    if options.html:
        options.html.write_text(report.page(name, result), encoding="utf-8")
    if options.hlo and text:
        with gzip.open(options.hlo, "wt", compresslevel=3) as file:
            file.write(text)
    if not result.fits:
        m = result.memory
        cli.fail(
            f"{name} does not fit {topology.name}: a device needs {m.peak / 2**30:.2f} GiB and has "
            f"{m.size / 2**30:.2f}; " + fit.suggest(config, topology, plan, work)
        )
    return 0


def _claims(flags: list[str], plan: Planner) -> None:
    options = cli.parse(Claims, flags, prog=f"{_CALLED} claims")
    rows = claims.claims(Topology(options.topology), Topology(options.serving), plan if options.compile else None)
    print(claims.table(rows))
    _write(options.json, [dataclasses.asdict(row) for row in rows])


def _grpo(name: str, options: PlanOptions, config: Config, topology: Topology, plan: Planner) -> None:
    check(not (options.html or options.hlo), "--html and --hlo are for one program; an iteration of GRPO has several")
    iteration = fit.grpo_iteration(config, topology, plan)
    print(report.grpo_table(iteration))
    _write(options.json, fit.figures(iteration))
    if not iteration.fits:
        highest = max(iteration.phases, key=lambda phase: phase.peak)
        cli.fail(
            f"{name} does not fit {topology.name}: {highest.name} needs {highest.peak / 2**30:.2f} GiB and a device "
            f"has {iteration.size / 2**30:.2f}; --mesh.expert splits the sampler's weights, and --grpo.offload and a "
            "smaller --batch.micro_size save most of the rest"
        )


def _parsed(name: str, flags: list[str]) -> PlanOptions:
    """The preset with the flags applied. Starts from the preset's layout for the topology, if there is one."""
    prog = f"{_CALLED} {name}"
    wanted = cli.parse(PlanOptions(**vars(PRESETS[name]())), flags, prog=prog)
    if not wanted.topology:
        cli.fail("--topology is missing: CHIP:XxYxZ, such as v5p:4x8x8")
    config, capacity = layouts.on_topology(name, wanted.topology), Capacity()
    serving = layouts.SERVING.get((name, wanted.topology))
    if wanted.decode and serving is not None:
        config, capacity = dataclasses.replace(config, mesh=serving.mesh), serving.capacity
    return cli.parse(PlanOptions(**vars(config), capacity=capacity), flags, prog=prog)


def _work(options: PlanOptions) -> Work:
    check(not (options.forward and options.decode), "--forward and --decode plan different programs: leave one out")
    if options.decode:
        return options.capacity.resolve(
            options.model, switch.implementation(options.compute, Topology(options.topology).kind)
        )
    return "forward" if options.forward else "step"


def _write(path: Path | None, figures: Any) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def planned(
    config: Config, topology: Topology, say: Callable[[str], None], work: Work = "step"
) -> tuple[Estimate, str]:
    """Compiles a config's program and returns (its estimate, its HLO)."""
    program, text = compiled(config, topology, say, work)
    return estimate(laid_out(config, topology, work), topology, program, text, say, work), text


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda text: print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
