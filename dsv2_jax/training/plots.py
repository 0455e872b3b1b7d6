"""Pictures of a finished run, from nothing but its metrics.jsonl: the loss curve, and the load of every expert."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a screen

import matplotlib.pyplot as plt
import numpy as np

from dsv2_jax.training import metrics

_INK, _TRAIN, _HELD_OUT, _RATE = "#333333", "#9bb8d3", "#c0392b", "#7f8c8d"


def draw(run: Path) -> list[Path]:
    """Draws what the run's metrics allow into its plots/ and returns the PNG files."""
    lines = metrics.read(run)
    train = [line for line in lines if line.get("nll") is not None]
    held_out = [line for line in lines if line.get("held_out_nll") is not None]
    loads = [line for line in held_out if "held_out_load_LE" in line]
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    with plt.rc_context({"axes.spines.top": False, "text.color": _INK, "axes.labelcolor": _INK, "font.size": 10}):
        if train:
            drawn.append(_loss(train, held_out, folder / "loss.png"))
        if loads:
            drawn.append(_expert_load(loads[-1], folder / "expert_load.png"))
    return drawn


def _loss(train: list[dict[str, Any]], held_out: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    tokens, nll = (np.array([line[name] for line in train], float) for name in ("tokens", "nll"))
    axes.plot(tokens, nll, color=_TRAIN, linewidth=1, label="training, single steps")
    window = max(1, len(nll) // 50)
    if window > 1:
        axes.plot(tokens[window - 1 :], np.convolve(nll, np.ones(window) / window, "valid"), color="#2c6fab",
                  label=f"training, mean of {window} lines")  # fmt: skip
    if held_out:
        axes.plot(
            [line["tokens"] for line in held_out],
            [line["held_out_nll"] for line in held_out],
            "o-", color=_HELD_OUT, markersize=4, label="held out",
        )  # fmt: skip
        last = held_out[-1]
        axes.annotate(
            f"{last['held_out_bits_per_byte']:.3f} bits per byte",
            (last["tokens"], last["held_out_nll"]),
            xytext=(-6, 12), textcoords="offset points", ha="right", color=_HELD_OUT,
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=f"Loss of {path.parent.parent.name}")
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(tokens, [line["lr"] for line in train], color=_RATE, linewidth=1, linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate", color=_RATE)
    rate.set_ylim(bottom=0)
    handles = [h for a in (axes, rate) for h in a.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, loc="upper right")
    return _save(figure, path)


def _expert_load(line: dict[str, Any], path: Path) -> Path:
    load_LE = np.array(line["held_out_load_LE"])
    layers, experts = load_LE.shape
    figure, axes = plt.subplots(
        figsize=(max(6, min(16, experts / 4)), max(2.5, min(14, layers / 4 + 2))), layout="constrained"
    )
    image = axes.imshow(
        load_LE, aspect="auto", cmap="RdBu_r", norm=matplotlib.colors.TwoSlopeNorm(1, 0, max(2, load_LE.max()))
    )
    figure.colorbar(image, label="load, 1 is average")
    axes.set(
        xlabel="expert",
        ylabel="MoE layer",
        title=f"Load of the experts on the held-out split, step {line['step']:,}: "
        f"{load_LE.min():.2f} to {load_LE.max():.2f}",
    )
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
