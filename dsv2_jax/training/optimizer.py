"""AdamW in optax's pieces, and the paper's schedules of learning rate and batch size (section 3.1.2).

The schedules are plain Python on the host: token counts of real runs (8.1e12) do not fit a device's int32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv2_jax.config import Config
from dsv2_jax.config import Optimizer as OptimizerConfig

_RAMP_SIZES = 8  # at most so many batch sizes before the full one: each is a program to compile


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1 and clipped gradients: Adam, then decoupled weight decay on matrices.

    Multiply the updates by minus the learning rate of the step. State and arithmetic are float32.
    """
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
    )


def clip(gradients: Any, norm: jax.Array, config: OptimizerConfig) -> Any:
    """Gradients of the global norm `norm`, shrunk to `clip_norm` where they exceed it."""
    scale = jnp.minimum(1.0, config.clip_norm / norm)
    return jax.tree.map(lambda g: g * scale, gradients)


def is_decayed(params: Any) -> Any:
    """True for every parameter that weight decay shrinks: all but those whose name begins with `norm`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.startswith("norm"), params)


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """The learning rate of step number `step` (from 0), before which the run has seen `tokens` tokens.

    A linear rise that reaches the peak at the last of the warm-up steps; then the peak, times `decay_factor` for each
    fraction of the run's tokens in `decay_at` that has passed.
    """
    o = config.optimizer
    warm = min(1.0, (step + 1) / o.warmup_steps) if o.warmup_steps else 1.0
    return o.peak_lr * warm * o.decay_factor ** sum(tokens >= f * config.tokens for f in o.decay_at)


def batch_size(config: Config, tokens: int) -> int:
    """Sequences of the step before which the run has seen `tokens` tokens.

    The ramp is a staircase below the straight line from `ramp_from` to `size`: steps of equal length in tokens, as many
    as there are micro-batches to add but no more than 8, each rounded down to whole micro-batches. The full size comes
    at `ramp_tokens`. So one run compiles at most 9 programs.
    """
    b = config.batch
    if not b.ramp_from or tokens >= b.ramp_tokens:
        return b.size
    micro = b.micro_size or b.size
    added = (b.size - b.ramp_from) // micro  # micro-batches
    stairs = max(1, min(_RAMP_SIZES, added))
    return b.ramp_from + added * (tokens * stairs // b.ramp_tokens) // stairs * micro
