"""Compiles a program for a topology in a quiet process of its own, or finds it compiled already."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from dsv2_jax import cli
from dsv2_jax.config import Batch, Cadence, Config, Data, Grpo, Processes, check, to_json
from dsv2_jax.inference import programs
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.ops import switch
from dsv2_jax.parallel import sharding, xla
from dsv2_jax.parallel.mesh import BATCH
from dsv2_jax.plan.program import HLO, PROGRAM, REQUEST, Program, Work
from pallas_kernels.chips import CHIPS, Chip

_ROOT = Path(__file__).resolve().parent.parent.parent
# What a compiled step depends on; the rest of plan/ only reads it.
_CODE = (
    "dsv2_jax/alignment/objective.py",
    "dsv2_jax/alignment/policy.py",
    "dsv2_jax/config",
    "dsv2_jax/evaluation/perplexity.py",
    "dsv2_jax/inference",
    "dsv2_jax/model",
    "dsv2_jax/parallel",
    "dsv2_jax/parameters.py",
    "dsv2_jax/training",
    "dsv2_jax/plan/decode.py",
    "dsv2_jax/plan/program.py",
)
_QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips by name: `v5p:4x8x8`."""

    name: str

    def __post_init__(self) -> None:
        found = re.fullmatch(r"(\w+):(\d+x\d+(?:x\d+)?)", self.name)
        check(found is not None, f"a topology reads CHIP:XxYxZ, or CHIP:XxY on a chip with four links, not {self.name}")
        kind = self.kind
        told = cli.nearest(kind, CHIPS) or "; there are " + ", ".join(CHIPS)
        check(kind in CHIPS, f"unknown chip '{kind}'{told}")
        dims = 3 if self.chip.links == 6 else 2
        check(len(self.shape) == dims, f"a topology of {kind} has {dims} dimensions: {self.name} has {len(self.shape)}")

    @property
    def kind(self) -> str:
        """The name of its chips in the table of facts."""
        return self.name.split(":")[0]

    @property
    def chip(self) -> Chip:
        """The facts of its chips."""
        return CHIPS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each dimension."""
        return tuple(int(n) for n in self.name.split(":")[1].split("x"))

    @property
    def chips(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of one slice."""
        return self.chips * self.chip.devices


def laid_out(config: Config, topology: Topology, work: Work = "step") -> Config:
    """The config with its mesh resolved, and without what no step depends on. Raises ValueError if it does not fit.

    A forward pass takes the batch at once and drops nothing. The batch of a decode step is its sequences.
    """
    mesh = config.mesh.resolve(topology.devices * config.mesh.slices)
    sharding.check_model(config.model, mesh)
    batch, tokens, stage = config.batch, config.tokens, config.grpo
    if isinstance(work, Capacity):
        programs.check_mesh(mesh)
        stage = Grpo()
        batch = Batch(size=work.rows * mesh.size(*BATCH), length=work.length)
        tokens = batch.size * batch.length
    else:
        batch = dataclasses.replace(batch, micro_size=0) if work == "forward" else batch
        dropping = work == "step"
        sharding.check_batch(batch.micro_size or batch.size, batch.length, config.model, mesh, dropping=dropping)
    compute = config.compute
    if compute.dtype == "auto":  # what it is on a TPU
        compute = dataclasses.replace(compute, dtype="bfloat16")
    compute = dataclasses.replace(compute, kernels=switch.implementation(compute, topology.kind))
    return dataclasses.replace(
        config,
        batch=batch,
        tokens=tokens,
        compute=compute,
        mesh=mesh,
        grpo=stage,
        workdir=Path(),
        init=None,
        resume=True,
        data=Data(),
        cadence=Cadence(),
        processes=Processes(),
    )


def compiled(
    config: Config, topology: Topology, say: Callable[[str], None], work: Work = "step"
) -> tuple[Program, str]:
    """The program of a config's step on the topology, and its HLO ("" where it does not fit the chips' HBM).

    say: is told what goes on. work: another program instead of the step. The result is kept in the folder of
    compiled programs, named after the config, the topology, the source of the step, the compiler's options and version.
    Raises ValueError if the config or the topology cannot be, and RuntimeError with the compiler's own words for
    anything else.
    """
    config = laid_out(config, topology, work)
    check(importlib.util.find_spec("libtpu") is not None, "no libtpu to compile with: pip install libtpu")
    folder = _folder(config, topology, work)
    if not (folder / PROGRAM).exists():
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "config": json.loads(to_json(config)),
            "topology": topology.name,
            "slices": config.mesh.slices,
            "work": work if isinstance(work, str) else dataclasses.asdict(work),
        }
        (folder / REQUEST).write_text(json.dumps(request))
        _run(folder, topology, say)
    said = json.loads((folder / PROGRAM).read_text())
    program = Program(**said | {"coords": tuple(map(tuple, said["coords"]))})
    return program, gzip.decompress((folder / HLO).read_bytes()).decode() if program.fits else ""


def _run(folder: Path, topology: Topology, say: Callable[[str], None]) -> None:
    say(f"starting the compiler for {topology.name}")
    if xla.left_out():
        say(xla.left_out())
    with (folder / "stderr.txt").open("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv2_jax.plan.program", str(folder)],
            cwd=_ROOT,
            env=os.environ | _QUIET,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                say(f"{line.strip()} for {topology.name}")
            failed = process.wait()
        finally:
            process.kill()
        stderr.seek(0)
        told = [line.strip() for line in stderr if re.match(r"\S*(Error|Exception)\b|jax\.errors", line)]
    if failed:
        reason = told[-1] if told else f"it ended with exit code {failed}"
        if "INVALID_ARGUMENT" in reason and "topology" in reason.lower():
            raise ValueError(f"there is no topology {topology.name}: {reason.split('INVALID_ARGUMENT:')[-1].strip()}")
        raise RuntimeError(f"the compiler for {topology.name} failed: {reason}; see {folder / 'stderr.txt'}")


def _folder(config: Config, topology: Topology, work: Work) -> Path:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "dsv2_jax"
    digest = hashlib.sha256()
    tools = map(importlib.metadata.version, _TOOLS)
    for part in (to_json(config), topology.name, repr(work), json.dumps(xla.options()), *tools):
        digest.update(part.encode() + b"\0")
    for path in sources(*_CODE, "pallas_kernels"):
        digest.update(path.read_bytes() + b"\0")
    return Path(cache) / "plan" / digest.hexdigest()[:24]


_TOOLS = ("jax", "jaxlib", "libtpu", "flax", "optax")


def sources(*names: str) -> list[Path]:
    """The Python files of these files and folders of the project."""
    roots = [_ROOT / name for name in names]
    return [path for root in roots for path in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
