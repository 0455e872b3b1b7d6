"""Alignment presets (section 4): the paper's recipe and its small version for laptops. --init gives the base model."""

import dataclasses
from pathlib import Path

from dsv2_jax.config import Batch, Cadence, Compute, Config, Data, Grpo, Optimizer
from dsv2_jax.presets import models


def v2_sft() -> Config:
    """Supervised fine-tuning of DeepSeek-V2: two epochs (section 4.1). Needs --init and --data.source."""
    model = models.v2()
    return Config(
        workdir=Path("runs/v2_sft"),
        tokens=0,
        epochs=2,
        model=dataclasses.replace(model, moe=dataclasses.replace(model.moe, budget_sequences=8)),
        data=Data(form="conversations"),
        batch=Batch(size=256),  # not in the paper
        optimizer=Optimizer(peak_lr=5e-6, warmup_steps=100, decay_at=()),
    )


def v2_grpo_reasoning() -> Config:
    """GRPO's first stage, maths (section 4.2). Needs --init and --data.source; for code, --grpo.rewards code."""
    model = models.v2()
    return Config(
        workdir=Path("runs/v2_grpo_reasoning"),
        tokens=0,
        model=dataclasses.replace(model, moe=dataclasses.replace(model.moe, budget_sequences=8)),
        data=Data(form="prompts"),
        batch=Batch(size=1024, micro_size=256),  # from here on not in the paper
        optimizer=Optimizer(peak_lr=1e-6, warmup_steps=10, decay_at=(), weight_decay=0.0),
        cadence=Cadence(log=1, evaluate=50, save=50),
        grpo=Grpo(group=64, prompts=16, steps=1000, max_new=2048, rewards=("maths",), replay=True, offload=True),
    )


def v2_grpo_preference() -> Config:
    """GRPO's second stage: helpful, safety and rule rewards (section 4.2). Needs --init, --data.source, rewards."""
    reasoning = v2_grpo_reasoning()
    rewards = ("runs/v2_reward_helpful", "runs/v2_reward_safety", "form")
    return dataclasses.replace(
        reasoning,
        workdir=Path("runs/v2_grpo_preference"),
        grpo=dataclasses.replace(reasoning.grpo, rewards=rewards, weights=(1.0, 1.0, 1.0)),
    )


def nano_sft() -> Config:
    """Supervised fine-tuning of nano on short questions with verifiable answers. Needs --init runs/nano."""
    return Config(
        workdir=Path("runs/nano_sft"),
        tokens=0,
        epochs=1,
        model=models.nano(),
        data=Data(form="conversations"),
        batch=Batch(size=4, length=256),
        optimizer=Optimizer(peak_lr=1e-3, warmup_steps=20, decay_at=(0.6, 0.9)),
        compute=Compute(remat="none", loss_chunk=512),
        cadence=Cadence(log=10, evaluate=250, evaluate_batches=8, save=250),
    )


def nano_grpo() -> Config:
    """GRPO of nano on counting relatives and on equations. Needs --init runs/nano_sft."""
    return Config(
        workdir=Path("runs/nano_grpo"),
        tokens=0,
        model=models.nano(),
        data=Data(form="prompts", tasks=("aiw", "simple_equations")),
        batch=Batch(size=128, length=80),
        optimizer=Optimizer(peak_lr=4e-4, warmup_steps=5, decay_at=(0.7,), weight_decay=0.0),
        compute=Compute(remat="none", loss_chunk=512),
        cadence=Cadence(log=1, evaluate=48, save=32),
        grpo=Grpo(group=8, prompts=64, passes=1, steps=96, max_new=6, beta=0.001, evaluate_prompts=1024),
    )


def nano_reward() -> Config:
    """A reward model of nano that separates right from wrong answers. Needs --init runs/nano_sft."""
    return Config(
        workdir=Path("runs/nano_reward"),
        tokens=0,
        epochs=1,
        model=dataclasses.replace(models.nano(), head="score"),
        data=Data(form="preferences", tasks=("aiw",)),
        batch=Batch(size=4, length=256),
        optimizer=Optimizer(peak_lr=3e-4, warmup_steps=20, decay_at=(0.6, 0.9)),
        compute=Compute(remat="none", loss_chunk=512),
        cadence=Cadence(log=10, evaluate=250, evaluate_batches=8, save=250),
    )
