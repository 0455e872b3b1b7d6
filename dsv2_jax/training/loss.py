"""The pretraining loss: next-token cross-entropy plus DeepSeekMoE's balance losses."""

from typing import Any

from jax import Array

from dsv2_jax.config import Config
from dsv2_jax.model import router, transformer
from dsv2_jax.parallel import pipeline
from dsv2_jax.parallel.mesh import PIPELINE, TENSOR
from dsv2_jax.training.cross_entropy import cross_entropy


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
    """One device's part of a micro-batch's loss and metrics; their sums over devices and micro-batches are the step's.

    batch leaves are [B, T]. exempt_B bool: sequences without token dropping; None: no tokens are dropped. total_weight:
    the sum of the step's weights. share: 1 / (number of calls). micro_batches: the number of micro-batches in the rows,
    for a pipeline. Metrics are float32 and weighted: `nll` in nats per token, `tokens` (targets) and `bytes` (their
    UTF-8 bytes); with experts also the balance losses summed over layers, `dropped` (share of token-expert pairs)
    and `load_LE` (an expert's share of the choices, times E).
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
    if mesh.size(*PIPELINE) > 1:
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
        "tokens": batch["weights_BT"].sum() / mesh.size(*TENSOR),
        "bytes": (batch["weights_BT"] * batch["bytes_BT"]).sum() / mesh.size(*TENSOR),
    }
    total, metrics = balanced(metrics["nll"], metrics, out.statistics, share)
    if out.statistics:
        metrics["dropped"] = out.statistics["dropped"].mean() * share
    return total, metrics


def balanced(
    value: Array, metrics: dict[str, Array], statistics: dict[str, Array], share: Array | float
) -> tuple[Array, dict[str, Array]]:
    """Adds the balance losses of `router.LOSSES` (eq. 23 to 31) to a stage's loss; them and `load_LE` to its metrics.

    statistics: of the MoE layers. {} (no MoE layers) leaves both unchanged. share: as in `loss`.
    """
    if not statistics:
        return value, metrics
    balances = {name: statistics[name].sum() * share for name in router.LOSSES}
    return value + sum(balances.values()), metrics | balances | {"load_LE": statistics["load_E"] * share}
