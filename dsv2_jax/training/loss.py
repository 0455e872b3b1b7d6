"""The pretraining loss: next-token cross-entropy plus DeepSeekMoE's balance losses."""

from typing import Any

from jax import Array

from dsv2_jax.config import Config
from dsv2_jax.model import transformer
from dsv2_jax.parallel import pipeline
from dsv2_jax.training.cross_entropy import cross_entropy

BALANCES = ("expert_balance", "device_balance", "communication_balance")


def loss(
    params: Any,
    batch: dict[str, Array],
    *,
    config: Config,
    exempt_B: Array | None,
    total_weight: Array | float,
    share: Array | float,
    micro_batches: int = 1,
) -> tuple[Array, dict[str, Array]]:
    """One micro-batch's part of a step's loss and metrics, on one device: over both the parts add up to the step's.

    batch leaves [B, T]. exempt_B bool: sequences spared from dropping; None: nothing is dropped. total_weight: sum of
    the weights of the whole step. share: one over the number of calls. micro_batches: those that follow each other in
    the rows of this call, for a pipeline. Metrics, float32, by weight: `nll` in
    nats per token, `tokens` and `bytes` (targets, and the UTF-8 bytes they stand for); with experts also the three
    balance losses summed over layers, `dropped` (share of token-expert pairs) and `load_LE` (an expert's share of the
    choices times E).
    """
    model, mesh = config.model, config.mesh
    out, w_head_DW = transformer.forward_masters(
        params,
        batch,
        model=model,
        compute=config.compute,
        mesh=mesh,
        exempt_B=exempt_B,
        micro_batches=micro_batches,
    )
    if mesh.pipeline > 1:
        batch = {name: pipeline.part(leaf, mesh) for name, leaf in batch.items()}
    nll: Array = cross_entropy(
        out.hidden_BTD.reshape(-1, model.hidden_size),
        w_head_DW,
        batch["targets_BT"].reshape(-1),
        batch["weights_BT"].reshape(-1),
        config.compute.loss_chunk,
        mesh,
    )
    metrics = {
        "nll": nll / total_weight,
        "tokens": batch["weights_BT"].sum() / mesh.tensor,
        "bytes": (batch["weights_BT"] * batch["bytes_BT"]).sum() / mesh.tensor,
    }
    total, metrics = balanced(metrics["nll"], metrics, out.statistics, share)
    if out.statistics:
        metrics["dropped"] = out.statistics["dropped"].mean() * share
    return total, metrics


def balanced(
    value: Array, metrics: dict[str, Array], statistics: dict[str, Array], share: Array | float
) -> tuple[Array, dict[str, Array]]:
    """A stage's own loss with the three balance losses added (eq. 23 to 31), and its metrics with these and `load_LE`.

    statistics: of the layers with experts, {} where there are none, which leaves both as they are. share: as in `loss`.
    """
    if not statistics:
        return value, metrics
    balances = {name: statistics[name].sum() * share for name in BALANCES}
    return value + sum(balances.values()), metrics | balances | {"load_LE": statistics["load_E"] * share}
