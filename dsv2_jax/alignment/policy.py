"""The policy in GRPO's update: the log-probabilities of given responses, and the loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.alignment import objective
from dsv2_jax.config import Config
from dsv2_jax.model import transformer
from dsv2_jax.parallel import sharding
from dsv2_jax.training.cross_entropy import token_log_probabilities
from dsv2_jax.training.loss import balanced


def loss(
    params: Any,
    batch: dict[str, Array],
    *,
    config: Config,
    exempt_B: Array | None,
    total_weight: Array | float,
    share: Array | float,
) -> tuple[Array, dict[str, Array]]:
    """GRPO's loss and the balance losses of one micro-batch, by the convention of `training.loss.loss`.

    A row is a prompt followed by a response. weights_BT is 1 / (tokens of the response) at each of its tokens, so
    total_weight counts responses; the optional kept_BT is 0 in responses without loss. No tokens are dropped, because
    the sampler drops none.
    """
    del exempt_B
    g = config.grpo
    policy_BT, entropy_BT, statistics = _policy(params, batch, config)
    mask_BT = (batch["weights_BT"] > 0).astype(jnp.float32) * batch.get("kept_BT", 1.0)
    correction_BT = objective.truncated_ratio(batch["old_BT"], batch["sampler_BT"], g.truncate) if g.truncate else None
    logp_BT = objective.LogProbabilities(policy_BT, batch["old_BT"], batch["reference_BT"])
    advantages_B = batch["advantages_BT"][:, 0]
    value, figures = objective.objective(
        logp_BT, advantages_B, mask_BT, clip=g.clip, beta=g.beta, level=g.level, correction_NT=correction_BT
    )
    figures["entropy"] = (entropy_BT * batch["weights_BT"]).sum()
    figures = {name: x / total_weight for name, x in figures.items()}
    figures["objective"] = value / total_weight
    return balanced(figures["objective"], figures, statistics, share)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def log_probabilities(
    params: Any, batch: dict[str, Array], *, config: Config, mesh: jax.sharding.Mesh | None
) -> tuple[Array, Array | None]:
    """(log-probabilities of the targets, float32 [A, B, T]; the tokens' experts, int16 [A, B, T, L, K]).

    The experts are None for a model without MoE layers.
    """

    def run(params: Any, batch: dict[str, Array]) -> tuple[Array, Array | None]:
        def one(batch: dict[str, Array]) -> tuple[Array, Array | None]:
            logp_BT, _, statistics = _policy(params, batch, config)
            if not statistics:
                return logp_BT, None
            return logp_BT, jnp.moveaxis(statistics["experts_BTK"], 0, 2).astype(jnp.int16)

        return jax.lax.map(one, batch)

    if mesh is None:
        return run(params, batch)
    specs = sharding.param_specs(config.model, config.mesh), {name: sharding.batch_spec(name) for name in batch}
    out = sharding.batch_spec("logp_BT"), sharding.batch_spec("experts_BTLK")
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(params, batch)


def _policy(params: Any, batch: dict[str, Array], config: Config) -> tuple[Array, Array, dict[str, Array]]:
    """(log-probabilities of the targets, entropies, the layers' statistics)."""
    model, shape = config.model, batch["targets_BT"].shape
    out, w_head_DW = transformer.forward_masters(params, batch, model=model, compute=config.compute, mesh=config.mesh)
    hidden_ND, targets_N = out.hidden_BTD.reshape(-1, model.hidden_size), batch["targets_BT"].reshape(-1)
    found = token_log_probabilities(hidden_ND, w_head_DW, targets_N, config.compute.loss_chunk)
    logp_BT, entropy_BT = (x.reshape(shape) for x in found)
    return logp_BT, entropy_BT, out.statistics
