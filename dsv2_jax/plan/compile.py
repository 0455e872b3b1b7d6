"""Compiles a program for a topology in a separate process, or loads it from the cache."""

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
from dsv2_jax.plan.program import HLO, PROGRAM, REQUEST, CompiledProgram, Work
from pallas_kernels.chips import CHIPS, Chip

_ROOT = Path(__file__).resolve().parent.parent.parent
# The source files that determine a compiled program. The rest of plan/ only reads the result.
_CODE = (
    "dsv2_jax/alignment/objective.py",
    "dsv2_jax/alignment/policy.py",
    "dsv2_jax/config",
    "dsv2_jax/evaluation/perplexity.py",
    "dsv2_jax/inference",
    "dsv2_jax/model",
    "dsv2_jax/ops",
    "dsv2_jax/parallel",
    "dsv2_jax/parameters.py",
    "dsv2_jax/training",
    "dsv2_jax/plan/program.py",
)
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
_ENVIRONMENT = {  # lets libtpu compile without a TPU, and silences its logs
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips by name, such as `v5p:4x8x8`."""

    name: str

    def __post_init__(self) -> None:
        found = re.fullmatch(r"(\w+):(\d+x\d+(?:x\d+)?)", self.name)
        check(found is not None, f"a topology is CHIP:XxYxZ, or CHIP:XxY for a chip with four links, not {self.name}")
        kind = self.kind
        hint = cli.nearest(kind, CHIPS) or "; there are " + ", ".join(CHIPS)
        check(kind in CHIPS, f"unknown chip '{kind}'{hint}")
        dims = 3 if self.chip.links == 6 else 2
        check(len(self.shape) == dims, f"a topology of {kind} has {dims} dimensions: {self.name} has {len(self.shape)}")

    @property
    def kind(self) -> str:
        """The name of its chips in `pallas_kernels.chips`."""
        return self.name.split(":")[0]

    @property
    def chip(self) -> Chip:
        """The specification of its chips."""
        return CHIPS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of chips along each dimension."""
        return tuple(int(n) for n in self.name.split(":")[1].split("x"))

    @property
    def chips(self) -> int:
        """Number of chips in one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices in one slice."""
        return self.chips * self.chip.devices


def laid_out(config: Config, topology: Topology, work: Work = "step") -> Config:
    """Resolves the mesh and the automatic settings, and resets the fields that do not affect the compiled program.

    A forward pass has one micro-batch and drops no tokens. The batch of a decode step is its sequences. Raises
    ValueError if the model or the batch does not fit the mesh.
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
    if compute.dtype == "auto":  # bfloat16 on a TPU
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
) -> tuple[CompiledProgram, str]:
    """Returns a config's program on the topology and its HLO, which is "" if the program does not fit the HBM.

    say: logs progress. The result is cached by config, topology, work, source code, compiler options and package
    versions. Raises ValueError for an impossible config or topology, and RuntimeError with the compiler's message for
    any other failure.
    """
    config = laid_out(config, topology, work)
    check(importlib.util.find_spec("libtpu") is not None, "libtpu is not installed: pip install libtpu")
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
    figures = json.loads((folder / PROGRAM).read_text())
    program = CompiledProgram(**figures | {"coords": tuple(map(tuple, figures["coords"]))})
    return program, gzip.decompress((folder / HLO).read_bytes()).decode() if program.fits else ""


def _run(folder: Path, topology: Topology, say: Callable[[str], None]) -> None:
    say(f"starting the compiler for {topology.name}")
    if xla.left_out():
        say(xla.left_out())
    with (folder / "stderr.txt").open("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv2_jax.plan.program", str(folder)],
            cwd=_ROOT,
            env=os.environ | _ENVIRONMENT,
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
        errors = [line.strip() for line in stderr if re.match(r"\S*(Error|Exception)\b|jax\.errors", line)]
    if failed:
        reason = errors[-1] if errors else f"exit code {failed}"
        if "INVALID_ARGUMENT" in reason and "topology" in reason.lower():
            raise ValueError(f"there is no topology {topology.name}: {reason.split('INVALID_ARGUMENT:')[-1].strip()}")
        raise RuntimeError(f"the compiler for {topology.name} failed: {reason}; see {folder / 'stderr.txt'}")


def _folder(config: Config, topology: Topology, work: Work) -> Path:
    digest = hashlib.sha256()
    versions = map(importlib.metadata.version, _PACKAGES)
    for part in (to_json(config), topology.name, repr(work), json.dumps(xla.options()), *versions):
        digest.update(part.encode() + b"\0")
    for path in sources(*_CODE, "pallas_kernels"):
        digest.update(path.read_bytes() + b"\0")
    return cache_folder() / digest.hexdigest()[:24]


def cache_folder() -> Path:
    """The folder of compiled programs and kernel estimates."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "dsv2_jax"
    return Path(folder) / "plan"


def sources(*names: str) -> list[Path]:
    """The Python files in the given files and folders, named relative to the project's root."""
    roots = [_ROOT / name for name in names]
    return [path for root in roots for path in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
