"""Draws the README's figure from a finished run: its loss curve, and under it a text that the model continues.

    python scripts/demo_figure.py RUN

Reads metrics.jsonl, eval.json and sample.txt of the run's folder, and writes plots/demo.png there.
"""

import json
import sys
import textwrap
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

from dsv2_jax.training import metrics, plots  # noqa: E402

_LINES, _COLUMNS = 10, 100  # of the sample


def main(run: Path) -> None:
    """Writes RUN/plots/demo.png."""
    lines = metrics.read(run)
    train = [line for line in lines if line.get("nll") is not None]
    held_out = [line for line in lines if line.get("held_out_nll") is not None]
    figures = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    sample = (run / "sample.txt").read_text(encoding="utf-8").strip()
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure, (loss, text) = plt.subplots(2, 1, figsize=(9, 5.6), height_ratios=[5, 3], layout="constrained")
        plots.loss_curve(loss, train, held_out)
        loss.xaxis.set_major_formatter(EngFormatter(sep=""))
        loss.set(
            xlabel="tokens",
            title=f"Held-out text: {figures['bits_per_byte']:.3f} bits per byte; "
            f"xz -9 on the same text: {figures['xz_bits_per_byte']:.3f}",
        )
        text.axis("off")
        text.set_title("The trained model continues a prompt", loc="left")
        text.text(0, 1, _wrapped(sample), family="monospace", va="top", parse_math=False, transform=text.transAxes)
        (run / "plots").mkdir(exist_ok=True)
        figure.savefig(run / "plots" / "demo.png", dpi=130)


def _wrapped(sample: str) -> str:
    rows = [row for line in sample.splitlines() for row in textwrap.wrap(line, _COLUMNS)]
    return "\n".join([*rows[:_LINES], "..."] if len(rows) > _LINES else rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
