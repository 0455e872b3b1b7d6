"""Estimates the cost of a kernel without a TPU: python -m pallas_kernels.cost OP --chip v5p --shape v2 [--json FILE].

--tune tries all candidate block sizes. pricing/cost.py documents what the figures include.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NoReturn

import jax

from pallas_kernels.chips import KERNEL_CHIPS
from pallas_kernels.pricing.cost import Cost, check, op_cost
from pallas_kernels.pricing.ops import OPS, Op

_NEAR = 1.05  # estimates closer than this count as equal; the smallest blocks win, as they suit short inputs better


def show(cost: Cost) -> str:
    """The estimate as text."""
    lines = [
        f"{cost.chip}: estimate {cost.us:,.1f} us, roofline {cost.roofline_us:,.1f} us ({cost.bound}), "
        f"efficiency {cost.efficiency:.3f}"
    ]
    for k in cost.kernels:
        copied = ", ".join(f"{kind} {n / 1e6:,.1f} MB in {k.copies[kind]:,}" for kind, n in k.copied.items())
        lines += [
            f"  {k.name}: {k.us:,.1f} us, {k.stalled_us:,.1f} us of them stalled; HBM busy {k.hbm_us:,.1f} us; "
            f"MXUs busy {k.mxu:.0%}; {k.matmuls:,} matmuls",
            f"    copies: {copied or 'none'}",
            f"    VMEM {k.vmem / 2**20:.1f} MiB; spills {k.spills:,}, fills {k.fills:,}",
            *(
                f"    run at {run['address']:#x}: {run['trips']:,} x {run['cycles']:,} cycles, {run['matmuls']:,} "
                f"matmuls, spills {run['spills']}, fills {run['fills']}"
                for run in k.longest_runs
            ),
        ]
    return "\n".join(lines + [f"  warning: {text}" for text in cost.warnings])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parsed() -> argparse.Namespace:
    """The arguments of the command line. Raises ValueError for a mistake in them."""
    parser = _Parser(prog="python -m pallas_kernels.cost", description="Estimates the cost of a kernel without a TPU.")
    flags = [
        parser.add_argument("op", help=f"one of {', '.join(OPS)}"),
        parser.add_argument("--chip", required=True, help=f"one of {', '.join(KERNEL_CHIPS)}"),
        parser.add_argument("--shape", required=True, help="a shape of the op: v2, v2_lite or nano"),
        parser.add_argument("--tune", action="store_true", help="try all candidate block sizes"),
        parser.add_argument("--json", type=Path, help="write the figures to this file"),
    ]
    options, unknown = parser.parse_known_args()
    for argument in unknown:
        check(argument, [name for flag in flags for name in flag.option_strings], "flag")
    check(options.op, OPS, "op")
    check(options.chip, KERNEL_CHIPS, "chip")
    check(options.shape, OPS[options.op].shapes, "shape")
    return options


def main() -> int:
    """The command line."""
    try:
        options = _parsed()
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX spends a long time looking for a TPU
    found = tune(OPS[options.op], options.chip, options.shape) if options.tune else None
    result = found or op_cost(OPS[options.op], options.chip, options.shape)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0


def tune(op: Op, chip: str, shape: str) -> Cost:
    """Prints the cost of every candidate for the blocks, and the entry for the table of tuned blocks.

    The entry is the first candidate, in order from small blocks to large ones, within 5% of the cheapest.
    Raises ValueError if the compiler rejects all of them.
    """
    results = []
    for blocks in op.candidates(op.shapes[shape]):
        try:
            results.append((op_cost(op, chip, shape, blocks), blocks))
            print(f"{results[-1][0].us:12,.1f} us  {blocks}", flush=True)
        except ValueError as rejected:
            print(f"     rejected    {blocks}: {str(rejected)[:120]}", flush=True)
    if not results:
        raise ValueError(f"the compiler rejects every candidate for {shape} on {chip}")
    cheapest = min(result.us for result, _ in results)
    best, blocks = next(result for result in results if result[0].us <= _NEAR * cheapest)
    print(f"    ({chip!r}, {op.key(op.shapes[shape])}): {blocks},")
    return best


if __name__ == "__main__":
    sys.exit(main())
