"""A training stage as a value: its loss, its evaluation, its data, its first parameters, and its closing lines.

The loop trains any stage. Pretraining, fine-tuning and reward modelling are the values `pretraining.STAGE`,
`alignment.sft.STAGE` and `alignment.reward.STAGE`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import grain
import jax
import numpy as np

from dsv2_jax.config import Config
from dsv2_jax.training.checkpoint import Progress
from dsv2_jax.training.step import Loss

Batches = Iterator[dict[str, np.ndarray]]


class Evaluation(Protocol):
    """Computes the means of a stage's figures over held-out batches, `{headline: value, ...}`.

    `evaluation.perplexity.evaluate` is one.
    """

    def __call__(
        self, params: Any, batches: Batches, *, config: Config, place: Any, mesh: jax.sharding.Mesh | None
    ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageData:
    """What a stage trains on and is evaluated on; leaves of batches are the rows of this process, [B, T]."""

    train: grain.DatasetIterator  # an endless iterator of micro-batches; a checkpoint stores its state
    held_out: Callable[[int | None], Batches]  # the held-out split, or at most this number of its batches
    epoch_tokens: int  # rows x length of one pass over the training split
    notes: tuple[str, ...] = ()  # lines for the log, such as the number of dropped conversations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, for `loop.train`.

    data(config, mine): opens the data and writes the tokenizer to the run's folder. The config's mesh is resolved;
    mine are the rows of a batch that this process reads, None for all.
    parameters(config, mesh): the float32 parameters of `config.init`, laid out on the mesh. Without `config.init` the
    loop initialises them from the seed.
    """

    name: str
    loss: Loss
    evaluate: Evaluation
    data: Callable[[Config, Sequence[int] | np.ndarray | None], StageData]
    parameters: Callable[[Config, jax.sharding.Mesh | None], Any]
    headline: str  # the figure of `evaluate` that the log and the last line show
    head: Literal["tokens", "score"] = "tokens"  # the `model.head` that it trains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a call of `train` ended. files: additional files of the run's folder to list at the end."""

    run: Path
    progress: Progress
    finished: bool  # False: SIGTERM stopped the run after a checkpoint
    held_out: dict[str, Any]  # figures of the full held-out split, such as `held_out_bits_per_byte`; {} if stopped
    headline: str
    files: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The closing lines of the command. Only the first process of a finished run has all figures for them."""
        if not self.finished:
            return [f"stopped after step {self.progress.step:,} and saved; run the same command to continue"]
        value = self.held_out[f"held_out_{self.headline}"]
        shown = {
            "checkpoint": self.run / "checkpoints" / str(self.progress.step),
            **{Path(name).stem: self.run / name for name in ("metrics.jsonl", *self.files, "plots")},
            "held out": f"{value:.4f} {self.headline.replace('_', ' ')}",
        }
        return [f"{name:12}{text}" for name, text in shown.items()]
