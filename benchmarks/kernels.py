"""Prices every kernel at every shape for every chip, and writes the table of docs/kernels.md.

    python benchmarks/kernels.py [--ops OP ...] [--chips CHIP ...] [--out docs/kernels.md] [--json FILE]

No TPU is needed, only libtpu. All times are estimates; see pallas_kernels/cost.py for what is in them.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # a script's own folder is where Python looks, not the one it is called from

from dsv2_jax import cli  # noqa: E402
from pallas_kernels import chips, cost  # noqa: E402
from pallas_kernels.ops import OPS  # noqa: E402

_HEAD = """# What the kernels cost

Made by `python benchmarks/kernels.py --out docs/kernels.md`, without a TPU: estimates from the compiler's own final
bundles (`pallas_kernels/cost.py`), good for comparing kernels on one chip; differences under 10% say nothing.
Roofline: the longer of useful FLOPs at the peak and needed bytes at the HBM's. Efficiency: roofline / estimate.

| op | shape | chip | estimate, us | roofline, us | bound | efficiency | VMEM, MiB | doubts |
|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Price the kernels."""

    ops: tuple[str, ...] = tuple(OPS)
    chips: tuple[str, ...] = tuple(chips.CHIPS)
    out: Path | None = None  # the table, as Markdown
    json: Path | None = None  # the figures, for a program


def row(op: str, shape: str, result: cost.Cost) -> str:
    """A line of the table."""
    vmem = max(kernel.vmem for kernel in result.kernels) / 2**20
    figures = f"{result.us:,.1f} | {result.roofline_us:,.1f} | {result.bound} | {result.efficiency:.2f} | {vmem:.1f}"
    return f"| {op} | {shape} | {result.chip} | {figures} | {'; '.join(result.doubts)} |"


def main() -> None:
    """The command line."""
    options = cli.parse(Options, prog="benchmarks/kernels.py")
    for op in options.ops:
        cost.check(op, OPS, "op")
    jax.config.update("jax_platforms", "cpu")
    rows, figures = [], []
    for op in options.ops:
        for shape in OPS[op].shapes:
            for chip in options.chips:
                result = cost.op_cost(OPS[op], chip, shape)
                rows.append(row(op, shape, result))
                figures.append({"op": op, "shape": shape, **dataclasses.asdict(result)})
                print(rows[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.main(main)
