"""Compiles a function for a TPU that is not attached, and returns the compiler's dump of every Pallas kernel in it.

The TPU compiler reads its options once, when it is loaded, and may end the process if it cannot compile a kernel. So it
runs in its own process, `python -m pallas_kernels.pricing.compiler FOLDER TOPOLOGY`, on the exported program.
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
class CompiledKernel:
    """One Pallas kernel of a compiled program."""

    name: str
    bundles: str  # the final VLIW bundles, as the compiler prints them
    operands: Mapping[int, np.ndarray]  # integer operands with known values, by position
    vmem: int  # bytes of VMEM in use


def compile_kernels(fn: Callable, args: Sequence[Any], chip: Chip) -> list[CompiledKernel]:
    """Every Pallas kernel that `fn(*args)` runs on the chip, in the order of the compiled program.

    Leaves of args are shapes (`jax.ShapeDtypeStruct`), or numpy arrays where a kernel depends on values (group sizes,
    page tables). Those, and integers that the function computes from them alone, become the kernels' known operands.
    Raises ValueError without libtpu, for a program without a Pallas kernel, and with the compiler's message for a
    program that it rejects.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu is not installed: pip install libtpu (it compiles without a TPU)")
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
        _compile_in_process(Path(folder), chip)
        return list(_kernels(Path(folder), calls))


def _compile_in_process(folder: Path, chip: Chip) -> None:
    flags = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": ".*final_bundles.*",
        # In a small program XLA would put operands into VMEM; in a large one the kernel has to copy them from HBM.
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
    command = [sys.executable, "-m", "pallas_kernels.pricing.compiler", str(folder), chip.topology]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [n for n, line in enumerate(lines) if "Error: " in line or "Check failed" in line]
        message = " ".join(lines[errors[-1] if errors else -1 :][:3])
        raise ValueError(f"the compiler for {chip.topology} rejects the program: {message}")


def _kernels(folder: Path, calls: dict[str, list[dict[int, np.ndarray]]]) -> Iterator[CompiledKernel]:
    """Reads the dumps, in the order of the program. calls: known operands of each call, by kernel name."""
    lines = list(_KERNEL.finditer((folder / _HLO).read_text()))
    found = [(line[1], int(size[1]) if (size := _VMEM.search(line[0])) else 0) for line in lines]
    if not found:
        raise ValueError("no Pallas kernel in the program")
    seen: dict[str, int] = collections.Counter()
    for name, vmem in found:
        (dump,) = folder.glob(f"*-{name}-*[0-9]-final_bundles.txt")
        # XLA writes transformations around a call's name, and names calls that have none.
        call = max((known for known in calls if known and known in name), key=len, default="")
        known = calls.get(call, [{}])
        operands = known[min(seen[call], len(known) - 1)]
        seen[call] += 1
        yield CompiledKernel(name=name, bundles=dump.read_text(), operands=operands, vmem=vmem)


def _calls(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[tuple[str, dict[int, np.ndarray]]]:
    """Names of the Pallas calls in a jaxpr, each with its integer operands that are known.

    An operand is known if it can be computed from the arguments with known values.
    """
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
                integers = {
                    n: np.asarray(x) for n, x in enumerate(ins) if x is not None and np.asarray(x).dtype.kind in "iu"
                }
                calls.append((eqn.params["name"] or "", integers))
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


def _compile(folder: Path, topology: str) -> None:
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
    _compile(Path(sys.argv[1]), sys.argv[2])
