"""One training step: gradients accumulated over micro-batches, then one AdamW update unless a number is not finite.

On a mesh the whole step is one shard_map: every collective that a pod runs stands in this project's code. Dimensions:
A micro-batches, B sequences of a micro-batch, T time.
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
from dsv2_jax.parallel.mesh import BATCH, TOKENS
from dsv2_jax.training.loss import loss as pretraining_loss
from dsv2_jax.training.optimizer import adamw, clip

Metrics = dict[str, jax.Array]
# loss(params, batch, *, config, exempt_B, total_weight, share) -> (scalar, metrics), both adding up over micro-batches
# and devices
Loss = Callable[..., tuple[jax.Array, Metrics]]


class State(NamedTuple):
    """All that a step changes, or what stands for its arrays, such as their shardings.

    float32 masters; `step` int32 [] counts the steps taken, refused ones included.
    """

    params: Any
    optimizer: Any
    step: Any


def create(params: Any, config: Config) -> State:
    """The state before the first step, around freshly initialised or imported parameters."""
    return State(params, adamw(config.optimizer).init(params), jnp.zeros((), jnp.int32))


def state_specs(config: Config) -> State:
    """How a `State` is laid over the config's mesh; its sizes must be resolved."""
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
    """One update of the parameters.

    Takes batch leaves [A, B, T] and the learning rate; the state is donated. Returns the next state and the metrics of
    `loss` over the whole step, with `loss` (what was minimised), `grad_norm` (before clipping) and `skipped` float32:
    1 when loss, gradient norm or the norm of the update was not finite and parameters and optimizer state stayed as
    they were. With a `mesh`,
    whose sizes are `config.mesh`, state and batch are laid over it by `state_specs` and `sharding.batch_spec`.
    """
    if mesh is None:
        return _step(state, batch, lr, config=dataclasses.replace(config, mesh=SINGLE), loss=loss)
    step = functools.partial(_step, config=config, loss=loss)
    specs, whole = state_specs(config), PartitionSpec()
    inputs = (specs, {name: sharding.batch_spec(name) for name in batch}, whole)
    return jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=(specs, whole), check_vma=False)(state, batch, lr)


def _step(
    state: State, batch: dict[str, jax.Array], lr: jax.Array | float, *, config: Config, loss: Loss
) -> tuple[State, Metrics]:
    """`train_step` on this device's part."""
    mesh = config.mesh
    (value, metrics), gradients = _accumulate(state, batch, config, loss)
    value, metrics = jax.tree.map(lambda x: collectives.add(x, AXES, mesh), (value, metrics))
    gradients = sharding.reduce_gradients(gradients, config.model, mesh)
    norm = jnp.sqrt(sharding.sum_of_squares(gradients, config.model, mesh))

    held = sharding.optimizer_part(state.params, config.model, mesh)
    clipped = clip(gradients, norm, config.optimizer)
    updates, optimizer = adamw(config.optimizer).update(clipped, state.optimizer, held)
    updates = jax.tree.map(lambda u: lr * u, updates)
    moved = sharding.sum_of_squares(updates, config.model, mesh)  # finite gradients do not make a finite update
    finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(moved)
    params = jax.tree.map(jnp.subtract, held, updates)
    params, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, optimizer), (held, state.optimizer)
    )
    params = sharding.gather_params(params, config.model, mesh)
    metrics = metrics | {"loss": value, "grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
    return State(params, optimizer, state.step + 1), metrics


def exempt_sequences(config: Config, step: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which sequences [A, B] of a step are spared from token dropping (section 2.2.4): bool, a new draw every step.

    Of those that share a budget, `exempt_fraction` of their number, rounded up or down by chance: so buffers that hold
    the rounded-up number are always large enough.
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
    """((loss, metrics), gradients) of the whole step, summed in float32 over its micro-batches."""
    mesh, (micro_batches, rows) = config.mesh, batch["tokens_BT"].shape[:2]
    exempt_AB = exempt_sequences(config, state.step, (micro_batches, rows * mesh.size(*BATCH)))
    exempt_AB = jax.lax.dynamic_slice_in_dim(exempt_AB, collectives.index(BATCH, mesh) * rows, rows, 1)
    total_weight = collectives.add(batch["weights_BT"].sum(), TOKENS, mesh)
    common = {"config": config, "total_weight": total_weight, "share": 1.0 / micro_batches}

    def micro(inputs: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, Any]:
        one, exempt_B = inputs
        return jax.value_and_grad(loss, has_aux=True)(state.params, one, exempt_B=exempt_B, **common)

    if mesh.pipeline > 1:  # a pipeline takes all micro-batches at once
        rows_of = {name: leaf.reshape(-1, leaf.shape[-1]) for name, leaf in batch.items()}
        whole = functools.partial(loss, micro_batches=micro_batches, **(common | {"share": 1.0}))
        return jax.value_and_grad(whole, has_aux=True)(state.params, rows_of, exempt_B=exempt_AB.reshape(-1))

    inputs = (batch, exempt_AB)
    first = jax.tree.map(lambda x: x[0], inputs)
    if micro_batches == 1:
        return micro(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, first))
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, micro(x)), None), zeros, inputs)
    return total
