"""One training step: gradients accumulated over micro-batches, then one AdamW update unless a number is not finite.

Dimensions: A micro-batches, B sequences of a micro-batch, T time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv2_jax.config import Config
from dsv2_jax.training.loss import loss as pretraining_loss
from dsv2_jax.training.optimizer import adamw

Metrics = dict[str, jax.Array]
# loss(params, batch, *, config, exempt_B, total_weight, share) -> (scalar, metrics), both adding over micro-batches
Loss = Callable[..., tuple[jax.Array, Metrics]]


class State(NamedTuple):
    """All that a step changes. float32 masters; `step` int32 [] counts the steps taken, refused ones included."""

    params: Any
    optimizer: Any
    step: jax.Array


def create(params: Any, config: Config) -> State:
    """The state before the first step, around freshly initialised or imported parameters."""
    return State(params, adamw(config.optimizer).init(params), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "loss"), donate_argnames="state")
def train_step(
    state: State, batch: dict[str, jax.Array], lr: jax.Array | float, *, config: Config, loss: Loss = pretraining_loss
) -> tuple[State, Metrics]:
    """One update of the parameters.

    Takes batch leaves [A, B, T] and the learning rate; the state is donated. Returns the next state and the metrics of
    `loss` over the whole step, with `loss` (what was minimised), `grad_norm` (before clipping) and `skipped` float32:
    1 when loss or gradient norm was not finite and parameters and optimizer state stayed as they were.
    """
    (value, metrics), gradients = _accumulate(state, batch, config, loss)
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)

    updates, optimizer = adamw(config.optimizer).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
    params, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, optimizer), (state.params, state.optimizer)
    )
    metrics = metrics | {"loss": value, "grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
    return State(params, optimizer, state.step + 1), metrics


def exempt_sequences(config: Config, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which sequences [A, B] of a step are spared from token dropping (section 2.2.4): bool, a new draw every step."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return jax.random.bernoulli(key, config.model.moe.exempt_fraction, shape)


def _accumulate(state: State, batch: dict[str, jax.Array], config: Config, loss: Loss) -> tuple[Any, Any]:
    """((loss, metrics), gradients) of the whole step, summed in float32 over its micro-batches."""
    micro_batches = len(batch["tokens_BT"])
    exempt_AB = exempt_sequences(config, state.step, batch["tokens_BT"].shape[:2])
    common = {"config": config, "total_weight": batch["weights_BT"].sum(), "share": 1.0 / micro_batches}

    def micro(inputs: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, Any]:
        one, exempt_B = inputs
        return jax.value_and_grad(loss, has_aux=True)(state.params, one, exempt_B=exempt_B, **common)

    inputs = (batch, exempt_AB)
    first = jax.tree.map(lambda x: x[0], inputs)
    if micro_batches == 1:
        return micro(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(micro, first))
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, micro(x)), None), zeros, inputs)
    return total
