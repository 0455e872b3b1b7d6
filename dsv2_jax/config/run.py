"""The config of one training run, and the checks across its sections."""

import dataclasses
from pathlib import Path

from dsv2_jax.config.alignment import Grpo
from dsv2_jax.config.checks import check, check_finite
from dsv2_jax.config.compute import Compute
from dsv2_jax.config.data import Data
from dsv2_jax.config.model import Model
from dsv2_jax.config.parallel import Mesh, Processes
from dsv2_jax.config.training import Batch, Cadence, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, whole."""

    workdir: Path  # checkpoints, metrics and plots; a run found there is resumed
    resume: bool = True  # --no-resume: refuse a folder that holds a run, rather than go on with it
    seed: int = 0
    init: Path | None = None  # start from this run, its checkpoints/STEP or Hugging Face folder: also model, tokenizer
    tokens: int = 8_100_000_000_000  # of the whole run; 0 with --init: no step, the start is evaluated and saved
    epochs: int = 0  # or passes over the data, from which the tokens follow; 0: as `tokens` says
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    processes: Processes = Processes()
    compute: Compute = Compute()
    cadence: Cadence = Cadence()
    grpo: Grpo = Grpo()

    def __post_init__(self) -> None:
        check_finite(self)
        check(
            self.batch.length <= self.model.max_position_embeddings,
            f"batch.length ({self.batch.length}) exceeds model.max_position_embeddings "
            f"({self.model.max_position_embeddings})",
        )
        check(self.epochs >= 0, f"epochs must not be negative, not {self.epochs}")
        sampled = self.grpo.prompts * self.grpo.group
        check(
            sampled % self.batch.size == 0,
            f"batch.size ({self.batch.size}) must divide the grpo.prompts x grpo.group = {sampled} responses",
        )
        no_step = self.tokens == 0 and self.init is not None
        check(
            self.epochs > 0 or self.grpo.group > 0 or no_step or self.tokens >= self.batch.size * self.batch.length,
            f"tokens ({self.tokens}) is less than one batch of {self.batch.size} x {self.batch.length}",
        )
        check(
            not self.grpo.replay or self.model.moe_layers > 0,
            "grpo.replay is of a model's experts, and this one has none",
        )
        check(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        micro, shared = self.batch.micro_size or self.batch.size, self.model.moe.budget_sequences
        check(
            not shared or micro % shared == 0,
            f"moe.budget_sequences ({shared}) must divide the {micro} sequences of a micro-batch",
        )
