"""The long-context stage (section 3.1.4): a trained checkpoint with YaRN, trained further on long rows.

Parameters do not depend on positions, so `--init DIR` takes any checkpoint. The fields of YaRN replace those of the
checkpoint; its sizes, theta and original length stay. The config and the export of the run have all of them.
"""

import dataclasses
from pathlib import Path

from dsv2_jax.config import Batch, Cadence, Compute, Config, Data, Model, Optimizer
from dsv2_jax.presets import models, pretrain
from dsv2_jax.start import ModelField

SETS: tuple[ModelField, ...] = (
    "max_position_embeddings",
    "rope.kind",
    "rope.factor",
    "rope.beta_slow",
    "rope.beta_fast",
    "rope.mscale",
    "rope.mscale_all_dim",
)

_STEPS, _SEQUENCES, _LENGTH = 1000, 576, 32_768
_FACTOR = 40.0  # s; alpha 1 and beta 32 are the defaults of the config


def extended(model: Model, factor: float, positions: int) -> Model:
    """The model with YaRN, for up to `positions` tokens; its original length stays."""
    original = model.max_position_embeddings
    rope = dataclasses.replace(model.rope, factor=factor, original_max_position_embeddings=original)
    return dataclasses.replace(model, rope=rope, max_position_embeddings=positions)


def v2_long() -> Config:
    """DeepSeek-V2 to 128K: 1000 steps of 576 rows of 32K (section 3.1.4). Needs --init and --data.source."""
    return _paper(pretrain.v2(), Path("runs/v2_long"), 163_840)


def v2_lite_long() -> Config:
    """DeepSeek-V2-Lite to 32K by the same recipe (App. B). Needs --init and --data.source."""
    return _paper(pretrain.v2_lite(), Path("runs/v2_lite_long"), _LENGTH)


def _paper(base: Config, workdir: Path, positions: int) -> Config:
    lr = base.optimizer.peak_lr * base.optimizer.decay_factor**2  # the last rate of pretraining; not in the paper
    return dataclasses.replace(
        base,
        workdir=workdir,
        tokens=_STEPS * _SEQUENCES * _LENGTH,
        model=extended(base.model, _FACTOR, positions),
        batch=Batch(size=_SEQUENCES, length=_LENGTH, micro_size=_SEQUENCES),
        optimizer=Optimizer(peak_lr=lr, warmup_steps=0, decay_at=()),
    )


def nano_long() -> Config:
    """Nano from 512 to 8K positions, on rows of 4K. Needs --init runs/nano.

    The built-in corpus has few long documents, so rows are packed, and most of them ask for facts from earlier in the
    row (data/retrieval.py).
    """
    return Config(
        workdir=Path("runs/nano_long"),
        tokens=300 * 4096,
        model=extended(models.nano(), 16.0, 8192),
        data=Data(retrieval_share=0.8, retrieval_weight=30.0),
        batch=Batch(size=1, length=4096),
        optimizer=Optimizer(peak_lr=6e-4, warmup_steps=10, decay_at=(0.8,)),
        compute=Compute(remat="none", loss_chunk=1024),
        cadence=Cadence(log=10, evaluate=100, evaluate_batches=4, save=100),
    )
