"""The settings of a training step: batch, optimizer and step intervals."""

import dataclasses

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch size and its ramp (section 3.1.2)."""

    size: int = 9216  # sequences per step
    length: int = 4096  # tokens per sequence
    micro_size: int = 0  # sequences per forward and backward pass; 0: the full batch
    ramp_from: int = 0  # sequences of the first step; 0: no ramp
    ramp_tokens: int = 0  # tokens over which the batch grows to `size`

    def __post_init__(self) -> None:
        check(self.size > 0 and self.length > 0, "batch.size and batch.length must be positive")
        micro = self.micro_size or self.size
        check(self.size % micro == 0, f"batch.size ({self.size}) must be a multiple of batch.micro_size ({micro})")
        if self.ramp_from:
            check(
                0 < self.ramp_from <= self.size and self.ramp_from % micro == 0,
                f"batch.ramp_from ({self.ramp_from}) must be a multiple of batch.micro_size ({micro}) and "
                f"at most batch.size ({self.size})",
            )
            check(self.ramp_tokens > 0, "batch.ramp_tokens must be positive if batch.ramp_from is set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning rate schedule: linear warm-up, constant, then a step down at each of `decay_at`."""

    peak_lr: float = 2.4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms are not decayed
    clip_norm: float = 1.0
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)  # fractions of all tokens
    decay_factor: float = 0.316

    def __post_init__(self) -> None:
        check(self.peak_lr > 0, f"optimizer.peak_lr must be positive, not {self.peak_lr}")
        check(
            0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
            "optimizer.beta1 and optimizer.beta2 must be at least 0 and below 1",
        )
        check(self.clip_norm > 0, f"optimizer.clip_norm must be positive, not {self.clip_norm}")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps must be at least 0")
        check(
            all(0 < f < 1 for f in self.decay_at) and list(self.decay_at) == sorted(self.decay_at),
            f"optimizer.decay_at must be rising fractions between 0 and 1, not {self.decay_at}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """Step intervals for logging, evaluation and checkpoints."""

    log: int = 10
    evaluate: int = 1000
    evaluate_batches: int = 16  # held-out batches per evaluation; the last evaluation reads all of them
    save: int = 1000
    keep: int = 2  # number of newest checkpoints to keep

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(getattr(self, field.name) > 0, f"cadence.{field.name} must be positive")
