"""Plots of a finished run from its metrics.jsonl: loss, expert load, reward and KL of GRPO."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from dsv2_jax.training import metrics

_INK, _TRAIN, _MEAN, _HELD_OUT = "#333333", "#a9c4de", "#2c6fab", "#c0392b"


def draw(run: Path) -> list[Path]:
    """Draws the plots that the run's metrics allow into its plots/ and returns the PNG files."""
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
        if sampled := [line for line in lines if "response_tokens" in line]:
            drawn.append(_grpo(sampled, [line for line in lines if "held_out_reward" in line], folder / "grpo.png"))
        if loads:
            drawn.append(_expert_load(loads[-1], folder / "expert_load.png"))
    return drawn


def _loss(train: list[dict[str, Any]], held_out: list[dict[str, Any]], path: Path) -> Path:
    figure, (loss, rate) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained")
    loss_curve(loss, train, held_out)
    if held_out:
        last = held_out[-1]
        loss.annotate(
            f"{last['held_out_bits_per_byte']:.3f} bits per byte",
            (last["tokens"], last["held_out_nll"]),
            xytext=(0, -20),
            textcoords="offset points",
            ha="right",
            color=_HELD_OUT,
        )
    loss.set(title=f"Loss of {path.absolute().parent.parent.name}")
    rate.plot([line["tokens"] for line in train], [line["lr"] for line in train], color=_INK, linewidth=1.2)
    rate.set(xlabel="tokens", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    rate.grid(alpha=0.25)
    return _save(figure, path)


def loss_curve(axes: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """Draws the loss of logged steps and of held-out text over tokens on matplotlib axes."""
    tokens, nll = (np.array([line[name] for line in train], float) for name in ("tokens", "nll"))
    axes.plot(tokens, nll, color=_TRAIN, linewidth=1, label="training, single steps")
    window = len(nll) // 50
    if window > 1:
        mean = np.convolve(nll, np.ones(window) / window, "valid")
        axes.plot(tokens[window // 2 :][: len(mean)], mean, color=_MEAN, label=f"training, mean of {window} lines")
    if held_out:
        at = [line["tokens"] for line in held_out]
        axes.plot(
            at, [line["held_out_nll"] for line in held_out], "o-", color=_HELD_OUT, markersize=4, label="held out"
        )
    axes.set(ylabel="loss, nats per token")
    axes.legend(frameon=False, loc="upper right")
    axes.grid(alpha=0.25)


def _grpo(train: list[dict[str, Any]], held_out: list[dict[str, Any]], path: Path) -> Path:
    figure, panels = plt.subplots(4, 1, figsize=(9, 9), sharex=True, layout="constrained")
    steps = [line["step"] for line in train]
    wanted = (("reward", "reward"), ("kl", "KL to the reference"), ("response_tokens", "tokens per response"))
    for axes, (name, label) in zip(panels, (*wanted, ("entropy", "entropy")), strict=True):
        axes.plot(steps, [line[name] for line in train], color=_MEAN, label="sampled")
        axes.set(ylabel=label)
        axes.grid(alpha=0.25)
    at = [line["step"] for line in held_out]
    panels[0].plot(
        at,
        [line["held_out_reward"] for line in held_out],
        "o-",
        color=_HELD_OUT,
        markersize=4,
        label="held out, greedy",
    )
    panels[0].legend(frameon=False, loc="lower right")
    panels[0].set(title=f"GRPO of {path.absolute().parent.parent.name}")
    panels[-1].set(xlabel="step")
    return _save(figure, path)


def _expert_load(line: dict[str, Any], path: Path) -> Path:
    load_LE = np.array(line["held_out_load_LE"])
    layers, experts = load_LE.shape
    size = (np.clip(experts / 4, 7, 16), np.clip(layers / 4 + 2, 2.5, 14))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2, load_LE.max()))
    image = axes.imshow(load_LE, aspect="auto", cmap="RdBu_r", norm=norm)
    figure.colorbar(image, label="load (1 is average)")
    span = f"{load_LE.min():.2f} to {load_LE.max():.2f}"
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"Experts' load, held-out split, step {line['step']:,}: {span}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
