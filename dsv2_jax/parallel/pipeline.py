"""Pipeline parallelism: MoE layers in equal stages, for slices that a slow network connects.

Every device runs the embedding and the dense layers, but only the first stage uses the result. Then micro-batches move
through the stages, one stage per tick. Each stage works in A of A + P - 1 ticks; the others are the bubble. The
backward pass runs the ticks in reverse. At the end each stage gets a part of the positions of all micro-batches, so
that all stages share the head's work.

    A micro-batches   P stages
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.config import Mesh
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.mesh import PIPELINE

# (module, x_BTD, per-micro-batch inputs) -> (y_BTD, statistics): this device's layers on one micro-batch
Stage = Callable[[Any, Array, Any], tuple[Array, dict[str, Array]]]


def run(stage: Stage, layer: nn.Module, x_ABTD: Array, inputs_A: Any, mesh: Mesh) -> tuple[Array, dict[str, Array]]:
    """Runs all micro-batches through all stages: (this stage's part of the positions [A, B, T / P, D], statistics).

    inputs_A: The other inputs of a stage, each leaf with a leading A. Statistics are this device's, summed over the
    micro-batches.
    """
    micro_batches, stages = x_ABTD.shape[0], mesh.size(*PIPELINE)
    stage_index = lax.axis_index(PIPELINE)

    def tick(layer: Any, carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], dict[str, Array]]:
        x_BTD, done_ABTD = carry
        works = (t >= stage_index) & (t - stage_index < micro_batches)
        i = jnp.clip(t - stage_index, 0, micro_batches - 1)
        x_BTD = jnp.where(stage_index == 0, x_ABTD[i], x_BTD)
        y_BTD, figures = stage(layer, x_BTD, jax.tree.map(lambda leaf: leaf[i], inputs_A))
        figures = {name: jnp.where(works, figure, 0) for name, figure in figures.items()}
        done_ABTD = done_ABTD.at[i].set(jnp.where(works & (stage_index == stages - 1), y_BTD, done_ABTD[i]))
        return (lax.ppermute(y_BTD, PIPELINE[0], [(s, s + 1) for s in range(stages - 1)]), done_ABTD), figures

    ticks = nn.scan(tick, variable_broadcast="params", split_rngs={"params": False})
    start = (jnp.zeros_like(x_ABTD[0]), jnp.zeros_like(x_ABTD))
    (_, done_ABTD), figures = ticks(layer, start, jnp.arange(micro_batches + stages - 1))
    statistics = {name: figure.sum(axis=0) for name, figure in figures.items()}
    return collectives.scatter(done_ABTD, PIPELINE, 2, mesh), statistics


def part(x_BT: Array, mesh: Mesh) -> Array:
    """This stage's part of the positions of [B, T, ...], as `run` returns them."""
    size = x_BT.shape[1] // mesh.size(*PIPELINE)
    return lax.dynamic_slice_in_dim(x_BT, collectives.index(PIPELINE, mesh) * size, size, 1)


def all_layers(x_L: Array, mesh: Mesh) -> Array:
    """Figures of this device's layers among those of all stages, with 0 for other layers: parts that add up."""
    all_L = jnp.zeros((x_L.shape[0] * mesh.size(*PIPELINE), *x_L.shape[1:]), x_L.dtype)
    return lax.dynamic_update_slice_in_dim(all_L, x_L, collectives.index(PIPELINE, mesh) * x_L.shape[0], 0)
