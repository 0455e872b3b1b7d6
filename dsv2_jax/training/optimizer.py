"""AdamW from optax's transformations, and the paper's schedules of learning rate and batch size (section 3.1.2).

The schedules run in Python on the host, because token counts of real runs (8.1e12) exceed int32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv2_jax import parameters
from dsv2_jax.config import Config
from dsv2_jax.config import Optimizer as OptimizerConfig

_RAMP_SIZES = 8  # maximum number of batch sizes before the full one; each needs its own compiled program


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam, then decoupled weight decay on matrices, for clipped gradients and a learning rate of 1.

    The caller multiplies the updates by minus the learning rate. State and arithmetic are float32.
    """
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
    )


def clip(gradients: Any, norm: jax.Array, config: OptimizerConfig) -> Any:
    """Gradients scaled to the global norm `clip_norm` if their norm, `norm`, is larger."""
    scale = jnp.minimum(1.0, config.clip_norm / norm)
    return jax.tree.map(lambda g: g * scale, gradients)


def is_decayed(params: Any) -> Any:
    """A tree of bools: True for parameters with weight decay, which are all that are drawn at first."""
    return jax.tree_util.tree_map_with_path(lambda path, _: parameters.initial(path[-1].key) is None, params)


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """The learning rate of step `step` (from 0), which starts after `tokens` tokens.

    It rises linearly to the peak at the last warm-up step, then is multiplied by `decay_factor` at each fraction of the
    run's tokens in `decay_at`.
    """
    o = config.optimizer
    warm = min(1.0, (step + 1) / o.warmup_steps) if o.warmup_steps else 1.0
    return o.peak_lr * warm * o.decay_factor ** sum(tokens >= f * config.tokens for f in o.decay_at)


def batch_size(config: Config, tokens: int) -> int:
    """Sequences of the step that starts after `tokens` tokens.

    The batch size grows from `ramp_from` in stairs of equal length in tokens, stays below the straight line to `size`,
    and reaches `size` at `ramp_tokens`. There is one stair for each micro-batch to add, but at most 8, so that a run
    compiles at most 9 programs. Sizes are rounded down to full micro-batches.
    """
    b = config.batch
    if not b.ramp_from or tokens >= b.ramp_tokens:
        return b.size
    micro = b.micro_size or b.size
    added = (b.size - b.ramp_from) // micro  # micro-batches
    stairs = max(1, min(_RAMP_SIZES, added))
    return b.ramp_from + added * (tokens * stairs // b.ramp_tokens) // stairs * micro
