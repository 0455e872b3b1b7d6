"""One training step: gradients accumulated over micro-batches, then one AdamW update if all values are finite.

On a mesh the step is one shard_map, so every collective is explicit in the code.

    A micro-batches    B sequences of a micro-batch    T time
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv2_jax.config import AXES, SINGLE, Config
from dsv2_jax.parallel import collectives, sharding
from dsv2_jax.parallel.mesh import BATCH, PIPELINE, TOKENS
from dsv2_jax.training.loss import loss as pretraining_loss
from dsv2_jax.training.optimizer import adamw, clip

Metrics = dict[str, jax.Array]
# loss(params, batch, *, config, exempt_B, total_weight, share) -> (scalar, metrics): parts to sum over micro-batches
# and devices (see `training.loss.loss`)
Loss = Callable[..., tuple[jax.Array, Metrics]]


class State(NamedTuple):
    """Parameters, optimizer state and step count; or a tree of the same structure, such as their shardings.

    Parameters are the float32 masters. `step` int32 [] counts all steps, skipped updates included.
    """

    params: Any
    optimizer: Any
    step: Any


def create(params: Any, config: Config) -> State:
    """The state before the first step, from initialised or imported parameters."""
    return State(params, adamw(config.optimizer).init(params), jnp.zeros((), jnp.int32))


def state_specs(config: Config) -> State:
    """The PartitionSpecs of a `State` on the config's mesh, whose sizes must be resolved."""
    model, mesh = config.model, config.mesh
    moments = sharding.optimizer_specs(model, mesh)
    params = jax.tree.map(lambda _: jnp.zeros(()), moments)
    optimizer = jax.tree.map(
        lambda leaf: moments if isinstance(leaf, dict) else PartitionSpec(),
        adamw(config.optimizer).init(params),
        is_leaf=lambda leaf: isinstance(leaf, dict),
    )
    return State(sharding.param_specs(model, mesh), optimizer, PartitionSpec())


@functools.partial(jax.jit, static_argnames=("config", "loss", "mesh"), donate_argnames="state")
def train_step(
    state: State,
    batch: dict[str, jax.Array],
    lr: jax.Array | float,
    *,
    config: Config,
    loss: Loss = pretraining_loss,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[State, Metrics]:
    """One update of the parameters; donates the state.

    Takes batch leaves [A, B, T] and the learning rate. Returns the next state and the step's metrics: those of `loss`,
    `loss` (the minimised value), `grad_norm` (before clipping) and `skipped` float32. `skipped` is 1 if the loss, the
    norm of the gradient or the norm of the update is not finite. Parameters and optimizer state then do not change.
    With a `mesh` of the sizes `config.mesh`, state and batch are laid out by `state_specs` and `sharding.batch_spec`.
    """
    if mesh is None:
        return _step(state, batch, lr, config=dataclasses.replace(config, mesh=SINGLE), loss=loss)
    step = functools.partial(_step, config=config, loss=loss)
    specs, replicated = state_specs(config), PartitionSpec()
    inputs = (specs, {name: sharding.batch_spec(name) for name in batch}, replicated)
    return jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=(specs, replicated), check_vma=False)(
        state, batch, lr
    )


def _step(
    state: State, batch: dict[str, jax.Array], lr: jax.Array | float, *, config: Config, loss: Loss
) -> tuple[State, Metrics]:
    """`train_step` on one device's shards."""
    mesh = config.mesh
    (value, metrics), gradients = _accumulate(state, batch, config, loss)
    value, metrics = jax.tree.map(lambda x: collectives.add(x, AXES, mesh), (value, metrics))
    gradients = sharding.reduce_gradients(gradients, config.model, mesh)
    norm = jnp.sqrt(sharding.sum_of_squares(gradients, config.model, mesh))

    held = sharding.optimizer_part(state.params, config.model, mesh)
    clipped = clip(gradients, norm, config.optimizer)
    updates, optimizer = adamw(config.optimizer).update(clipped, state.optimizer, held)
    updates = jax.tree.map(lambda u: lr * u, updates)
    moved = sharding.sum_of_squares(updates, config.model, mesh)  # may overflow although the gradients are finite
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(moved)
    params = jax.tree.map(jnp.subtract, held, updates)
    params, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, optimizer), (held, state.optimizer)
    )
    params = sharding.gather_params(params, config.model, mesh)
    metrics = metrics | {"loss": value, "grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
    return State(params, optimizer, state.step + 1), metrics


def exempt_sequences(config: Config, step: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The sequences of a step without token dropping (section 2.2.4), bool [A, B], drawn at random in each step.

    `exempt_fraction` of the sequences that share a budget are exempt. The number is rounded up or down at random, so
    buffers for the rounded-up number are always large enough.
    """
    moe = config.model.moe
    together = moe.budget_sequences or shape[1]
    choice, rounding = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    runs = (shape[0], shape[1] // together)
    wanted = moe.exempt_fraction * together
    count = math.floor(wanted) + jax.random.bernoulli(rounding, wanted - math.floor(wanted), (*runs, 1))
    order = jnp.argsort(jax.random.uniform(choice, (*runs, together)), axis=-1)
    return (jnp.argsort(order, axis=-1) < count).reshape(shape)


def _accumulate(state: State, batch: dict[str, jax.Array], config: Config, loss: Loss) -> tuple[Any, Any]:
    """((loss, metrics), gradients), summed in float32 over the step's micro-batches."""
    mesh, (micro_batches, rows) = config.mesh, batch["tokens_BT"].shape[:2]
    exempt_AB = exempt_sequences(config, state.step, (micro_batches, rows * mesh.size(*BATCH)))
    exempt_AB = jax.lax.dynamic_slice_in_dim(exempt_AB, collectives.index(BATCH, mesh) * rows, rows, 1)
    total_weight = collectives.add(batch["weights_BT"].sum(), TOKENS, mesh)
    common = {"config": config, "total_weight": total_weight, "share": 1.0 / micro_batches}

    def micro(inputs: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, Any]:
        one, exempt_B = inputs
        return jax.value_and_grad(loss, has_aux=True)(state.params, one, exempt_B=exempt_B, **common)

    if mesh.size(*PIPELINE) > 1:  # one call for all micro-batches
        rows_of = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
        all_at_once = functools.partial(loss, micro_batches=micro_batches, **(common | {"share": 1.0}))
        return jax.value_and_grad(all_at_once, has_aux=True)(state.params, rows_of, exempt_B=exempt_AB.reshape(-1))

    inputs = (batch, exempt_AB)
    first = jax.tree.map(lambda x: x[0], inputs)
    if micro_batches == 1:
        return micro(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, first))
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, micro(x)), None), zeros, inputs)
    return total
