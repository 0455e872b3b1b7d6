"""Compiles a function for a TPU that is not here, and keeps what the compiler wrote down of every Pallas kernel in it.

The TPU's compiler reads its options once, when it is loaded, and may end the process over a kernel it cannot compile.
So it works in a process of its own, `python -m pallas_kernels.compiler FOLDER TOPOLOGY`, on the exported program.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend as jex
import numpy as np

from pallas_kernels.chips import Chip

_PROGRAM, _HLO = "program", "hlo.txt"
_KERNEL = re.compile(r'^\s*(?:ROOT )?%(\S+) = .*custom_call_target="tpu_custom_call".*$', re.M)
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas kernel of a compiled program."""

    name: str
    bundles: str  # the final VLIW bundles, as the compiler prints them
    operands: Mapping[int, np.ndarray]  # by position, those integer operands whose values are known
    vmem: int  # bytes of VMEM that the kernel uses


def compile_kernels(fn: Callable, args: Sequence[Any], chip: Chip) -> list[Kernel]:
    """Every Pallas kernel that `fn(*args)` runs on the chip, in the order of the compiled program.

    Leaves of args are shapes (`jax.ShapeDtypeStruct`), or numpy arrays where values steer a kernel (group sizes, page
    tables): those, and what the function computes from them alone, become the kernels' known operands.
    Raises ValueError without libtpu, for a program without a Pallas kernel, and with the compiler's own words for one
    that it refuses.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("no libtpu to compile with: pip install libtpu (no TPU is needed)")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(args))
    device = jax.sharding.AbstractDevice(platform="tpu", device_kind=chip.kind, num_cores=chip.cores)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jaxpr = jax.make_jaxpr(fn)(*shapes)
        exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(*shapes)
    calls = collections.defaultdict(list)
    for name, operands in _calls(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(tuple(args))):
        calls[name].append(operands)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _PROGRAM).write_bytes(exported.mlir_module_serialized)
        _compile_there(Path(folder), chip)
        return list(_kernels(Path(folder), calls))


def _compile_there(folder: Path, chip: Chip) -> None:
    flags = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": ".*final_bundles.*",
        # In a small program XLA puts operands into VMEM: bytes that a kernel in a large one has to fetch.
        "xla_vf_vmem_memory_space_assignment": "false",
        "xla_gf_vmem_memory_space_assignment": "false",
        # The SparseCore would do gathers around the kernels in a form that jaxlib cannot read back.
        "xla_tpu_offload_gather_to_sparsecore": "false",
        "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    }
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--{flag}={value}" for flag, value in flags.items()),
    }
    command = [sys.executable, "-m", "pallas_kernels.compiler", str(folder), chip.topology]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [n for n, line in enumerate(lines) if "Error: " in line or "Check failed" in line]
        told = " ".join(lines[errors[-1] if errors else -1 :][:3])
        raise ValueError(f"the compiler for {chip.topology} refuses: {told}")


def _kernels(folder: Path, calls: dict[str, list[dict[int, np.ndarray]]]) -> Iterator[Kernel]:
    """Reads the dumps of a program whose calls are known by kernel name, in the order of the program."""
    lines = list(_KERNEL.finditer((folder / _HLO).read_text()))
    found = [(line[1], int(size[1]) if (size := _VMEM.search(line[0])) else 0) for line in lines]
    if not found:
        raise ValueError("no Pallas kernel in the program")
    turn: dict[str, int] = collections.Counter()
    for name, vmem in found:
        (dump,) = folder.glob(f"*-{name}-*[0-9]-final_bundles.txt")
        # XLA writes what a call was transformed by around its name, and finds names for calls that have none.
        call = max((known for known in calls if known and known in name), key=len, default="")
        known = calls.get(call, [{}])
        operands = known[min(turn[call], len(known) - 1)]
        turn[call] += 1
        yield Kernel(name=name, bundles=dump.read_text(), operands=operands, vmem=vmem)


def _calls(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[tuple[str, dict[int, np.ndarray]]]:
    """The Pallas calls in a jaxpr: names, and those integer operands that follow from the arguments with values."""
    calls = []

    def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, jex.core.Literal) else values.get(variable)

        for eqn in jaxpr.eqns:
            ins = [read(x) for x in eqn.invars]
            known = [x is not None for x in ins]
            outs: Sequence[Any] = [None] * len(eqn.outvars)
            inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
            if eqn.primitive.name == "pallas_call":
                steering = {
                    n: np.asarray(x) for n, x in enumerate(ins) if x is not None and np.asarray(x).dtype.kind in "iu"
                }
                calls.append((eqn.params["name"] or "", steering))
            elif all(known):
                result = eqn.primitive.bind(*ins, **eqn.params)
                outs = result if eqn.primitive.multiple_results else [result]
            elif inner is not None and eqn.primitive.name not in ("while", "scan", "cond"):
                closed = hasattr(inner, "consts")
                outs = run(inner.jaxpr if closed else inner, inner.consts if closed else (), ins)
            values |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    run(jaxpr, consts, [None if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x) for x in args])
    return calls


def _compile_here(folder: Path, topology: str) -> None:
    from jax.experimental import topologies
    from jaxlib import xla_client
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, (folder / _PROGRAM).read_bytes())
        program = device.client.compile(module, xla_client.DeviceList((device,)), xla_client.CompileOptions())
    (folder / _HLO).write_text(program.hlo_modules()[0].to_string())


if __name__ == "__main__":
    _compile_here(Path(sys.argv[1]), sys.argv[2])
