"""The cost of a kernel, estimated without a TPU.

The compiler (compiler.py) gives a kernel's final bundles. machine.py executes their scalar half, and bundles.py times
their vector half. Estimates serve to compare variants on one chip; differences below 10% mean nothing. The
roofline is the longer of two times: the useful FLOPs at the peak, and the necessary bytes at the HBM's bandwidth. XLA's
own operations around the kernels are not counted.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from pallas_kernels.chips import CHIPS, KERNEL_CHIPS
from pallas_kernels.pricing import bundles, compiler, machine
from pallas_kernels.pricing.ops import Op

_LONGEST = 4  # straight runs of bundles to report


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCost:
    """Estimate of one Pallas kernel on one core. With two cores, each runs half of the grid at the same time."""

    name: str
    us: float
    stalled_us: float  # part of it, waiting for copies
    hbm_us: float  # microseconds in which copies use the HBM
    mxu: float  # fraction of the time in which the MXUs are busy
    matmuls: int  # matmul instructions
    copied: dict[str, int]  # bytes, by direction: {"hbm_to_vmem": ...}
    copies: dict[str, int]
    spills: int  # vector registers spilled to memory
    fills: int  # and read back
    vmem: int  # bytes of VMEM in use
    longest_runs: tuple[dict[str, int], ...]  # address, trips, and of one trip: cycles, matmuls, spills, fills
    warnings: tuple[str, ...]  # why the estimate may be wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimate and roofline of a program's Pallas kernels."""

    chip: str
    flops: float
    bytes: float
    us: float
    roofline_us: float
    bound: Literal["mxu", "hbm"]
    efficiency: float  # roofline / estimate
    kernels: tuple[KernelCost, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the estimate may be wrong."""
        faster = ("faster than the roofline",) if self.efficiency > 1 else ()
        return faster + tuple(f"{kernel.name}: {text}" for kernel in self.kernels for text in kernel.warnings)


def cost(fn: Callable, args: Sequence[Any], chip: str, *, flops: float, bytes: float) -> Cost:
    """Estimates the Pallas kernels of `fn(*args)` on a chip of `chips.KERNEL_CHIPS`.

    args: shapes (`jax.ShapeDtypeStruct`), or numpy arrays where a kernel depends on values (group sizes, page tables).
    flops, bytes: the useful work of all cores, for the roofline. Raises ValueError for another chip, without libtpu,
    for a program without a Pallas kernel, and for one that the compiler rejects.
    """
    check(chip, KERNEL_CHIPS, "chip")
    kernels = tuple(_kernel_cost(kernel, chip) for kernel in compiler.compile_kernels(fn, args, CHIPS[chip]))
    us = sum(kernel.us for kernel in kernels)
    mxu_us = flops / (CHIPS[chip].peak * CHIPS[chip].cores) * 1e6
    hbm_us = bytes / (CHIPS[chip].hbm * CHIPS[chip].cores) * 1e6
    return Cost(
        chip=chip,
        flops=flops,
        bytes=bytes,
        us=us,
        roofline_us=max(mxu_us, hbm_us),
        bound="mxu" if mxu_us > hbm_us else "hbm",
        efficiency=max(mxu_us, hbm_us) / us,
        kernels=kernels,
    )


def check(name: str, names: Iterable[str], kind: str) -> None:
    """Raises ValueError with the nearest name unless `names` has the name."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"unknown {kind} '{name}'; {hint}")


def _kernel_cost(kernel: compiler.CompiledKernel, chip: str) -> KernelCost:
    trace = machine.execute(bundles.parse(kernel.bundles), CHIPS[chip], kernel.operands)
    us = 1e6 / CHIPS[chip].clock

    def total(field: str) -> Any:
        return sum(run.trips * getattr(run.schedule, field) for run in trace.runs)

    fields = ("cycles", "matmuls", "spills", "fills")
    return KernelCost(
        name=kernel.name,
        us=trace.cycles * us,
        stalled_us=trace.stalled * us,
        hbm_us=trace.hbm_cycles * us,
        mxu=total("mxu_cycles") / trace.cycles,
        matmuls=total("matmuls"),
        copied=dict(trace.copied),
        copies=dict(trace.copies),
        spills=total("spills"),
        fills=total("fills"),
        vmem=kernel.vmem,
        longest_runs=tuple(
            {"address": run.address, "trips": run.trips, **{field: getattr(run.schedule, field) for field in fields}}
            for run in trace.runs[:_LONGEST]
        ),
        warnings=trace.warnings,
    )


def op_cost(op: Op, chip: str, shape: str, blocks: Any = None) -> Cost:
    """The cost of an op at one of its shapes, by default with its tuned blocks."""
    size = op.shapes[shape]
    fn, args = op.build(size, chip, blocks or op.blocks(chip, size))
    return cost(fn, args, chip, flops=op.flops(size), bytes=op.bytes(size))
