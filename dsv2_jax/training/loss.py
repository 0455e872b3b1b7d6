"""The pretraining loss: next-token cross-entropy plus DeepSeekMoE's balance losses."""

from typing import Any

from jax import Array

from dsv2_jax.config import Config
from dsv2_jax.model import transformer
from dsv2_jax.model.layers import cast, compute_dtype
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
) -> tuple[Array, dict[str, Array]]:
    """One micro-batch's part of a step's loss and metrics; the parts of all micro-batches add up to the step's.

    batch leaves [B, T]. exempt_B bool: sequences spared from dropping; None: nothing is dropped. total_weight: sum of
    the weights of the whole step. share: one over the number of micro-batches. Metrics, float32: `nll` in nats per
    token; with experts also the three balance losses summed over layers, `dropped` (share of token-expert pairs) and
    `load_LE` (an expert's share of the choices times E).
    """
    dtype = compute_dtype(config.compute)
    operands = cast(transformer.arrange(params, config.model), dtype)
    out = transformer.forward(operands, batch, model=config.model, compute=config.compute, exempt_B=exempt_B)
    nll: Array = cross_entropy(
        out.hidden_BTD.reshape(-1, config.model.hidden_size),
        operands["head"]["w_head_DW"],
        batch["targets_BT"].reshape(-1),
        batch["weights_BT"].reshape(-1),
        config.compute.loss_chunk,
    )
    metrics = {"nll": nll / total_weight}
    if not out.statistics:
        return metrics["nll"], metrics
    metrics |= {name: out.statistics[name].sum() * share for name in BALANCES}
    total = metrics["nll"] + sum(metrics[name] for name in BALANCES)
    return total, metrics | {
        "dropped": out.statistics["dropped"].mean() * share,
        "load_LE": out.statistics["load_E"] * share,
    }
