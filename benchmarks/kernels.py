"""Prices every kernel at every shape for every chip, and writes the table of docs/kernels.md.

    python benchmarks/kernels.py [--ops OP ...] [--shapes SHAPE ...] [--chips CHIP ...] [--json FILE] [--out FILE]

No TPU is needed, only libtpu; a quarter of a minute each, and an hour for all on one core. All times are estimates;
see pallas_kernels/cost.py for what is in them. What stands in the JSON file is kept and not priced again: delete it
when a kernel has changed.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # a script's own folder is where Python looks, not the one it is called from

from dsv2_jax import cli  # noqa: E402
from pallas_kernels import chips  # noqa: E402
from pallas_kernels.pricing import cost  # noqa: E402
from pallas_kernels.pricing.ops import OPS  # noqa: E402

_HEAD = """# What the kernels cost

Made by `python benchmarks/kernels.py --out docs/kernels.md`, without a TPU: estimates from the compiler's own final
bundles (`pallas_kernels/cost.py`), good for comparing kernels on one chip; differences under 10% say nothing.
Roofline: the longer of useful FLOPs at the peak and needed bytes at the HBM's. Efficiency: roofline / estimate.
Best public: the fastest kernel of jax (splash attention, megablox) and tokamax at the same shape, priced in the same
way; empty where none was priced. A branch that hangs on data is taken as not taken, and named under doubts: in the
flash kernel it is the second pass over scores too large for the first.

What binds where little is gained on the best public kernel: expert_up at V2's sizes on v5e is near the MXU's peak, and
the first and last blocks of a pipeline are the rest; of V2-Lite on v6e and tpu7x the MXU is 256 wide, and 1408 columns
take the time of 1536. expert_gate_up stands in place of two expert_up and XLA's SiLU and product, and saves the
latter's passes over three arrays of hidden rows in the HBM; where both ways are bound by the MXU, as at V2's sizes on
v5, that is all there is to save.

latent_decode_int8 and _int6 read a cache in fewer bits: at the 128 heads of V2 the matrix units set the pace, and it
buys capacity; at the 16 of V2-Lite it buys time, until the matrix units cannot be fed the latents any faster.

`v2_decode` and `v2_decode_full` are a step of generation on one of 8 devices, each with 20 experts: 384 and 2,560
(token, expert) pairs. `_int8` and `_float8` read weights of 8 bits with a scale for each output channel: int8 becomes
bfloat16 in vector registers, float8_e4m3fn in the MXU, which a tpu7x does by itself; on the others Mosaic pushes it as
float8_e4m3b11fnuz, whose bits mean a 16th, and multiplies the sums by 16.

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
class Options:
    """Price the kernels."""

    ops: tuple[str, ...] = tuple(OPS)
    shapes: tuple[str, ...] = ()  # all of each op's, unless named
    chips: tuple[str, ...] = tuple(chips.KERNEL_CHIPS)
    out: Path | None = None  # the table, as Markdown, of all that is in the JSON file
    json: Path = Path("kernels.json")  # the figures, for a program


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
    options = cli.parse(Options, prog="benchmarks/kernels.py")
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
