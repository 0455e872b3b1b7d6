"""python -m pallas_kernels.cost OP --chip v5p --shape v2 [--tune] [--json FILE]: what a kernel costs, without a TPU.

Every figure is an estimate, from the compiler's own final bundles (compiler.py): their scalar half executed
(machine.py), their vector half timed (bundles.py). It is for comparing variants on one chip: differences under 10% say
nothing. Compared with it is the roofline: the time for the useful FLOPs at the peak, or for the bytes that have to move
at the HBM's bandwidth, whichever is longer. XLA's own operations around the kernels are not counted.
"""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax

from pallas_kernels import bundles, compiler, machine
from pallas_kernels.chips import CHIPS
from pallas_kernels.ops import OPS, Op

_NEAR = 1.05  # differences below are none: the smaller blocks, which come first, serve short inputs better
_HOTTEST = 4  # straight runs of bundles that are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCost:
    """One Pallas kernel's estimate, of one core: with two, each does its half of the grid at the same time."""

    name: str
    us: float
    stalled_us: float  # waiting for copies, in it
    hbm_us: float  # that copies keep the HBM busy
    mxu: float  # share of the time that the MXUs are busy
    matmuls: int  # matmul instructions
    copied: dict[str, int]  # bytes, by direction: {"hbm_to_vmem": ...}
    copies: dict[str, int]
    spills: int  # vector registers stored for want of registers
    fills: int  # and loaded again
    vmem: int  # bytes of VMEM in use
    hottest: tuple[dict[str, int], ...]  # straight runs: address, trips, cycles, matmuls, spills, fills of one trip
    doubts: tuple[str, ...]  # why not to trust it; empty in good order


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
    def doubts(self) -> tuple[str, ...]:
        """Why not to trust it; empty in good order."""
        faster = ("faster than the roofline",) if self.efficiency > 1 else ()
        return faster + tuple(f"{kernel.name}: {doubt}" for kernel in self.kernels for doubt in kernel.doubts)


def cost(fn: Callable, args: Sequence[Any], chip: str, *, flops: float, bytes: float) -> Cost:
    """Estimates the Pallas kernels of `fn(*args)` on a chip named in `chips.CHIPS`.

    args: shapes (`jax.ShapeDtypeStruct`), or numpy arrays where the values steer a kernel (group sizes, page tables).
    flops, bytes: the useful work of the whole chip, for the roofline. Raises ValueError for an unknown chip, without
    libtpu, for a program without a Pallas kernel and for one that the compiler refuses.
    """
    check(chip, CHIPS, "chip")
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
    """Raises ValueError, with the nearest name, for one that does not exist."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"unknown {kind} '{name}'; {hint}")


def _kernel_cost(kernel: compiler.Kernel, chip: str) -> KernelCost:
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
        hottest=tuple(
            {"address": run.address, "trips": run.trips, **{field: getattr(run.schedule, field) for field in fields}}
            for run in trace.runs[:_HOTTEST]
        ),
        doubts=trace.doubts,
    )


def show(cost: Cost) -> str:
    """The estimate as a table for people."""
    lines = [
        f"{cost.chip}: estimate {cost.us:,.1f} us, roofline {cost.roofline_us:,.1f} us ({cost.bound}), "
        f"efficiency {cost.efficiency:.3f}"
    ]
    for k in cost.kernels:
        copied = ", ".join(f"{kind} {n / 1e6:,.1f} MB in {k.copies[kind]:,}" for kind, n in k.copied.items())
        lines += [
            f"  {k.name}: {k.us:,.1f} us, of which {k.stalled_us:,.1f} stalled; HBM busy {k.hbm_us:,.1f} us; "
            f"MXUs busy {k.mxu:.0%}; {k.matmuls:,} matmuls",
            f"    copies: {copied or 'none'}",
            f"    VMEM {k.vmem / 2**20:.1f} MiB; spills {k.spills:,}, fills {k.fills:,}",
            *(
                f"    run at {run['address']:#x}: {run['trips']:,} x {run['cycles']:,} cycles, {run['matmuls']:,} "
                f"matmuls, spills {run['spills']}, fills {run['fills']}"
                for run in k.hottest
            ),
        ]
    return "\n".join(lines + [f"  doubt: {doubt}" for doubt in cost.doubts])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parsed() -> argparse.Namespace:
    """The command line. Raises ValueError for a mistake in it."""
    parser = _Parser(prog="python -m pallas_kernels.cost", description="Estimates what a kernel costs, without a TPU.")
    flags = [
        parser.add_argument("op", help=f"one of {', '.join(OPS)}"),
        parser.add_argument("--chip", required=True, help=f"one of {', '.join(CHIPS)}"),
        parser.add_argument("--shape", required=True, help="a shape of the op: v2, v2_lite or nano"),
        parser.add_argument("--tune", action="store_true", help="try all candidates for the block sizes"),
        parser.add_argument("--json", type=Path, help="write the figures to this file"),
    ]
    options, unknown = parser.parse_known_args()
    for word in unknown:
        check(word, [name for flag in flags for name in flag.option_strings], "flag")
    check(options.op, OPS, "op")
    check(options.chip, CHIPS, "chip")
    check(options.shape, OPS[options.op].shapes, "shape")
    return options


def main() -> int:
    """The command line."""
    try:
        options = _parsed()
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU, at length
    found = tune(OPS[options.op], options.chip, options.shape) if options.tune else None
    result = found or op_cost(OPS[options.op], options.chip, options.shape)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0


def op_cost(op: Op, chip: str, shape: str, blocks: Any = None) -> Cost:
    """The cost of a registered op at a shape of its list, with the tuned blocks or the given ones."""
    size = op.shapes[shape]
    fn, args = op.build(size, chip, blocks or op.blocks(chip, size))
    return cost(fn, args, chip, flops=op.flops(size), bytes=op.bytes(size))


def tune(op: Op, chip: str, shape: str) -> Cost:
    """Tries every candidate for the blocks, says what each costs, and prints the table's entry.

    That is the first of the candidates, smaller blocks before larger ones, that is as cheap as the cheapest.
    """
    results = []
    for blocks in op.candidates(op.shapes[shape]):
        try:
            results.append((op_cost(op, chip, shape, blocks), blocks))
            print(f"{results[-1][0].us:12,.1f} us  {blocks}", flush=True)
        except ValueError as refused:
            print(f"     refused     {blocks}: {str(refused)[:120]}", flush=True)
    if not results:
        raise ValueError(f"the compiler refuses every candidate for {shape} on {chip}")
    cheapest = min(result.us for result, _ in results)
    best, blocks = next(result for result in results if result[0].us <= _NEAR * cheapest)
    print(f"    ({chip!r}, {op.key(op.shapes[shape])}): {blocks},")
    return best


if __name__ == "__main__":
    sys.exit(main())
