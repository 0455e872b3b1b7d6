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
    """The config of one training run."""

    workdir: Path  # folder for checkpoints, metrics and plots; resumes the run in it
    resume: bool = True  # --no-resume: fail if workdir has a run already
    seed: int = 0
    # start from this run, checkpoints/STEP of a run, or Hugging Face folder: parameters, model settings and tokenizer
    init: Path | None = None
    # number of tokens to train on; 0 with --init: no training, evaluates and saves the checkpoint of --init
    tokens: int = 8_100_000_000_000
    epochs: int = 0  # passes over the data, which then set the tokens; 0: use `tokens`
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
        check(self.epochs >= 0, f"epochs must be at least 0, not {self.epochs}")
        sampled = self.grpo.prompts * self.grpo.group
        check(
            sampled % self.batch.size == 0,
            f"batch.size ({self.batch.size}) must divide the {sampled} responses, grpo.prompts x grpo.group",
        )
        no_step = self.tokens == 0 and self.init is not None
        check(
            self.epochs > 0 or self.grpo.group > 0 or no_step or self.tokens >= self.batch.size * self.batch.length,
            f"tokens ({self.tokens}) is less than one batch of {self.batch.size} x {self.batch.length}",
        )
        check(
            not self.grpo.replay or self.model.moe_layers > 0,
            "grpo.replay needs a model with routed experts",
        )
        check(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        micro, shared = self.batch.micro_size or self.batch.size, self.model.moe.budget_sequences
        check(
            not shared or micro % shared == 0,
            f"moe.budget_sequences ({shared}) must divide the {micro} sequences of a micro-batch",
        )
