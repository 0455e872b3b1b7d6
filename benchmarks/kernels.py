"""Estimates the cost of every kernel at every shape for every chip, and writes docs/kernel_costs.md.

    python benchmarks/kernels.py [--ops OP ...] [--shapes SHAPE ...] [--chips CHIP ...] [--json FILE] [--out FILE]

Needs libtpu but no TPU; takes about 15 seconds for each estimate, and an hour for all on one core. See
pallas_kernels/pricing/cost.py for what the estimates include. Figures in the JSON file are not computed again: delete
the file when a kernel changes.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from dsv2_jax import cli  # noqa: E402
from pallas_kernels import chips  # noqa: E402
from pallas_kernels.pricing import cost  # noqa: E402
from pallas_kernels.pricing.ops import OPS  # noqa: E402

_HEAD = """# Kernel costs

`python benchmarks/kernels.py --out docs/kernel_costs.md` writes this table without a TPU. All times are estimates from
the compiler's final instruction bundles. [Kernels](kernels.md) says how to read it.

| op | shape | chip | estimate, us | roofline, us | bound | efficiency | best public, us | VMEM, MiB | warnings |
|---|---|---|---|---|---|---|---|---|---|
"""
_PUBLIC = {  # (op, shape, chip): us
    ("latent_forward", "v2", "v5e"): 6824,
    ("latent_forward", "v2_lite", "v5e"): 778,
    ("latent_forward", "v2_lite", "v5p"): 342,
    ("latent_forward", "v2_lite", "v6e"): 303,
    ("latent_forward_backward", "v2_lite", "v6e"): 951,
    ("latent_decode", "v2", "v5e"): 1154,
    ("latent_decode", "v2", "v6e"): 436,
    ("latent_decode", "v2_lite", "v5e"): 882,
    ("latent_decode", "v2_lite", "v6e"): 497,
    ("expert_up", "v2", "v5e"): 2162,
    ("expert_up", "v2", "v6e"): 552,
    ("expert_up_input_gradient", "v2", "v6e"): 570,
    ("expert_up_weight_gradient", "v2", "v6e"): 774,
    ("expert_up", "v2_lite", "v6e"): 1547,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsBenchmark:
    """Estimate the cost of the kernels."""

    ops: tuple[str, ...] = tuple(OPS)
    shapes: tuple[str, ...] = ()  # by default all of each op
    chips: tuple[str, ...] = tuple(chips.KERNEL_CHIPS)
    out: Path | None = None  # a Markdown table of all figures in the JSON file
    json: Path = Path("kernels.json")  # the figures


def row(figures: dict[str, Any]) -> str:
    """A line of the table."""
    vmem = max(kernel["vmem"] for kernel in figures["kernels"]) / 2**20
    public = _PUBLIC.get((figures["op"], figures["shape"], figures["chip"]))
    cells = [
        *(figures[name] for name in ("op", "shape", "chip")),
        f"{figures['us']:,.1f}",
        f"{figures['roofline_us']:,.1f}",
        figures["bound"],
        f"{figures['efficiency']:.2f}",
        f"{public:,}" if public else "",
        f"{vmem:.1f}",
        "; ".join(figures["warnings"]),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    options = cli.parse(KernelsBenchmark, prog="benchmarks/kernels.py")
    for op in options.ops:
        cost.check(op, OPS, "op")
    jax.config.update("jax_platforms", "cpu")
    priced: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {(figures["op"], figures["shape"], figures["chip"]) for figures in priced}
    wanted = [(op, shape, chip) for op in options.ops for shape in OPS[op].shapes for chip in options.chips]
    for op, shape, chip in wanted:
        if (op, shape, chip) in done or (options.shapes and shape not in options.shapes):
            continue
        result = cost.op_cost(OPS[op], chip, shape)
        priced.append({"op": op, "shape": shape, **dataclasses.asdict(result), "warnings": result.warnings})
        print(row(priced[-1]), flush=True)
        options.json.write_text(json.dumps(priced, indent=2) + "\n", encoding="utf-8")
    if options.out:
        places = [
            (op, shape, chip) for op, found in OPS.items() for shape in found.shapes for chip in chips.KERNEL_CHIPS
        ]
        priced.sort(key=lambda figures: places.index((figures["op"], figures["shape"], figures["chip"])))
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(_HEAD + "\n".join(map(row, priced)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.main(main)
