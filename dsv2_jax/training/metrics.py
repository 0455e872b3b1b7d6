"""A run's log: JSON lines and TensorBoard curves at the log interval, and a progress bar or plain lines.

A line holds the exact values of its step, not an average, so a resumed run repeats them bit for bit. Metrics stay on
the device until two later steps are dispatched, so the device never waits for the log.
"""

import collections
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import tensorboardX

from dsv2_jax import parameters
from dsv2_jax.config import Config, Model
from dsv2_jax.parallel import processes
from dsv2_jax.training.checkpoint import Progress
from pallas_kernels.chips import CHIPS

_IN_FLIGHT = 2  # steps with metrics still on the device: enough to keep it busy


def flops_per_token(model: Model, length: int) -> float:
    """Model FLOPs of training on one token of a sequence of `length`, from which MFU is computed.

    6 per activated parameter (forward 2, backward 4), plus attention's two matmuls over the causal half of the
    positions: 3 x layers x heads x (key width + value width) x length. Recomputation is not counted.
    """
    a = model.attention
    attention = model.num_hidden_layers * a.num_attention_heads * (a.qk_head_dim + a.v_head_dim) * length
    return 6.0 * parameters.count_activated(model) + 3.0 * attention


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of all devices together; None for an unknown device.

    For a CPU it is measured: the fastest square matmul of the compute dtype within 0.2 s.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        known = (chip.published for chip in CHIPS.values() if chip.kind == device.device_kind)
        return next((peak * jax.device_count() for peak in known), None)
    size = 1024
    operand = jnp.ones((size, size), jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    matmul = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    matmul(operand).block_until_ready()
    best, end = math.inf, time.perf_counter() + 0.2
    while (start := time.perf_counter()) < end:
        matmul(operand).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def bits_per_byte(nll: float, tokens: float, text_bytes: float) -> float:
    """Bits per byte, from the mean loss in nats over `tokens` tokens of `text_bytes` bytes of text."""
    return nll * tokens / text_bytes / math.log(2) if text_bytes else math.nan


def load_summary(load_LE: np.ndarray) -> dict[str, float]:
    """The largest and the smallest expert load of any layer; 1 is the average."""
    return {"load_max": float(load_LE.max()), "load_min": float(load_LE.min())}


def read(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl, oldest first."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def truncate(run: Path, step: int) -> None:
    """Drops the lines after `step`, which the resumed run writes again; atomic."""
    partial = run / "metrics.jsonl.tmp"
    lines = (json.dumps(line) + "\n" for line in read(run) if line["step"] <= step)
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, run / "metrics.jsonl")


class Log:
    """Writes metrics.jsonl and tensorboard/, and shows progress; a context manager.

    Opening it drops the lines after `progress`, from which the run continues. Only the first process logs; in the
    others it does nothing.
    """

    def __init__(
        self, config: Config, progress: Progress, stage: str, headline: str, *, throughput: bool = True
    ) -> None:
        """stage: its name. headline: the held-out figure to print.

        throughput: False if training steps are only a part of the work, as in GRPO. Lines then have no throughput.
        """
        self._config, self._headline, self._throughput = config, headline, throughput
        self._first = processes.is_first()
        self._in_flight: collections.deque = collections.deque()
        # (time, tokens) of the last line; starts after the first step, which compiles
        self._clock: tuple[float, int] | None = None
        peak = peak_flops(config.compute.dtype)
        self._mfu_per_token = flops_per_token(config.model, config.batch.length) / peak if peak else None
        if not self._first:
            return
        truncate(config.workdir, progress.step)
        self._file = (config.workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(config.workdir / "tensorboard"), purge_step=progress.step + 1)
        self._display = Display(stage, headline, config.tokens, progress.tokens)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._first:
            return
        self._display.close()
        self._board.close()
        self._file.close()

    def record(self, progress: Progress, lr: float, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that ended at `progress`; writes them when they are available."""
        self._in_flight.append((progress, lr, metrics))
        while len(self._in_flight) > _IN_FLIGHT:
            self._write_oldest()

    def flush(self) -> None:
        """Writes all recorded metrics. Called before a save, so that a resumed run has every line up to it."""
        while self._in_flight:
            self._write_oldest()

    def held_out(self, progress: Progress, result: dict[str, Any], full: bool) -> None:
        """Writes an evaluation's figures; for the `full` held-out split also the load of every expert."""
        self.flush()
        if not self._first:
            return
        load_LE = result.get("load_LE")
        line = {f"held_out_{k}": v for k, v in result.items() if k != "load_LE"}
        if load_LE is not None:
            line |= {f"held_out_{k}": v for k, v in load_summary(np.asarray(load_LE)).items()}
        if full:
            line |= {"held_out_whole": True}
            line |= {"held_out_load_LE": np.round(load_LE, 4).tolist()} if load_LE is not None else {}
        self._write({"step": progress.step, "tokens": progress.tokens, **line})
        part = "held-out split" if full else "held-out sample"
        figure = f"{result[self._headline]:.4f} {self._headline.replace('_', ' ')}"
        self._display.say(f"step {progress.step:,}  {part}: {figure}")
        self._clock = time.perf_counter(), progress.tokens  # leaves the evaluation's time out of the throughput

    def figures(self, progress: Progress, figures: dict[str, float]) -> None:
        """Writes and prints figures that do not belong to one step, such as those of a GRPO evaluation."""
        self.flush()
        if not self._first:
            return
        self._write({"step": progress.step, "tokens": progress.tokens, **figures})
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        self._display.say(f"step {progress.step:,}  {text}")
        self._clock = time.perf_counter(), progress.tokens

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._first:
            self._display.say(text)

    def _write_oldest(self) -> None:
        progress, lr, on_device = self._in_flight.popleft()
        metrics = jax.device_get(on_device)
        if not self._first:
            return
        now = time.perf_counter()
        skipped = bool(metrics["skipped"])
        if skipped:
            self.say(f"step {progress.step:,}: loss, gradient norm or update is not finite; the update was skipped")
        if progress.step % self._config.cadence.log == 0 or progress.tokens >= self._config.tokens or skipped:
            load_LE = metrics.pop("load_LE", None)
            weight, text_bytes = float(metrics.pop("tokens", 0)), float(metrics.pop("bytes", 0))
            line = {"step": progress.step, "tokens": progress.tokens} | {k: float(v) for k, v in metrics.items()}
            line |= {"lr": lr, "skipped": int(skipped)}
            if "nll" in line:
                line["bits_per_byte"] = bits_per_byte(line["nll"], weight, text_bytes)
            line |= load_summary(load_LE) if load_LE is not None else {}
            if self._clock and self._throughput:
                speed = (progress.tokens - self._clock[1]) / (now - self._clock[0])
                line["tokens_per_second"] = speed
                if self._mfu_per_token:
                    line["mfu"] = speed * self._mfu_per_token
            self._write(line)
            self._display.show(line)
            self._clock = now, progress.tokens
        self._clock = self._clock or (now, progress.tokens)

    def _write(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, line["step"])


class Display:
    """Shows progress: a bar on a terminal, elsewhere one plain line per logged step."""

    def __init__(self, stage: str, headline: str, total_tokens: int, done_tokens: int) -> None:
        """stage: its name. headline: the figure to show next to the loss, if a line of metrics has it."""
        self._total = total_tokens
        self._shown = ("loss", headline, "kl")
        self._bar = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("[bold]{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
                rich.progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(stage, total=total_tokens, completed=done_tokens, figures="compiling")
            self._bar.start()

    def show(self, line: dict[str, Any]) -> None:
        """Shows the figures of a line of metrics."""
        short = {"bits_per_byte": "bits/byte", "kl": "KL"}
        figures = "  ".join(f"{short.get(key, key)} {line[key]:.4f}" for key in self._shown if key in line)
        if "tokens_per_second" in line:
            figures += f"  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=line["tokens"], figures=figures)
            return
        share = 100 * line["tokens"] / self._total
        mfu = f"  MFU {100 * line['mfu']:.1f}%" if "mfu" in line else ""
        print(f"step {line['step']:,}  {share:.1f}%  {figures}{mfu}  lr {line['lr']:.2e}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Restores the terminal."""
        if self._bar:
            self._bar.stop()
