"""Pretraining presets: the paper's recipe for its models, and small versions for laptops and tests."""

import dataclasses
from pathlib import Path

from dsv2_jax.config import Batch, Cadence, Compute, Config, Data, Optimizer
from dsv2_jax.presets import models


def v2() -> Config:
    """DeepSeek-V2, 236B, 8.1T tokens (section 3.1.2)."""
    model = models.v2()
    return Config(
        workdir=Path("runs/v2"),
        model=dataclasses.replace(model, moe=dataclasses.replace(model.moe, budget_sequences=8)),
        batch=Batch(size=9216, micro_size=2304, ramp_from=2304, ramp_tokens=225_000_000_000),
    )


def v2_lite() -> Config:
    """DeepSeek-V2-Lite, 15.7B, 5.7T tokens (App. B)."""
    return Config(
        workdir=Path("runs/v2_lite"),
        tokens=5_700_000_000_000,
        model=models.v2_lite(),
        batch=Batch(size=4608),
        optimizer=Optimizer(peak_lr=4.2e-4, decay_at=(0.8, 0.9)),
    )


def dense_67b() -> Config:
    """DeepSeek 67B, the dense baseline, with V2's recipe for a comparison of costs."""
    return Config(workdir=Path("runs/dense_67b"), model=models.dense_67b(), batch=Batch(size=4608))


def nano() -> Config:
    """8M parameters on the built-in corpus; trains on a laptop's CPU in minutes."""
    return Config(
        workdir=Path("runs/nano"),
        tokens=1_000_000,
        model=models.nano(),
        batch=Batch(size=4, length=256),
        optimizer=Optimizer(peak_lr=3e-3, warmup_steps=50),
        compute=Compute(remat="none", loss_chunk=512),
        cadence=Cadence(log=10, evaluate=250, evaluate_batches=8, save=250),
    )


def tiny() -> Config:
    """For tests; trains in seconds."""
    return Config(
        workdir=Path("runs/tiny"),
        tokens=20 * 4 * 32,
        model=models.tiny(),
        data=Data(fetch=False),
        batch=Batch(size=4, length=32),
        optimizer=Optimizer(peak_lr=1e-2, warmup_steps=4),
        cadence=Cadence(log=1, evaluate=10, evaluate_batches=2, save=5),
    )
