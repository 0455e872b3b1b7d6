"""The table of ops against the published costs, so that no kernel is left out of them."""

from pathlib import Path

from pallas_kernels.chips import KERNEL_CHIPS
from pallas_kernels.pricing.ops import OPS

COSTS = Path(__file__).parents[3] / "docs" / "kernel_costs.md"


def test_every_op_has_its_costs() -> None:
    """A row for each op, shape and chip, in the order of the table, as `benchmarks/kernels.py` writes them."""
    rows = [line.split(" | ")[:3] for line in COSTS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = [[op, shape, chip] for op, found in OPS.items() for shape in found.shapes for chip in KERNEL_CHIPS]
    assert [[op.removeprefix("| "), shape, chip] for op, shape, chip in rows[1:]] == listed
