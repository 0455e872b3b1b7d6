"""The reward model's stage (section 4.2): its loss, its accuracy, and the score at an answer's last token.

    pairs (Bradley-Terry)    -log sigmoid(score(better) - score(worse) - margin)
    scored answers           (score - value)^2

P preferences of a row; other letters as in parameters.py.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax import loading, pretraining
from dsv2_jax.config import Config
from dsv2_jax.evaluation import perplexity
from dsv2_jax.model import transformer
from dsv2_jax.parallel import collectives, pipeline
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.parallel.mesh import CONTEXT, PIPELINE, SAME_BATCH
from dsv2_jax.training.loss import balanced
from dsv2_jax.training.stage import Stage

_MIN_TOKENS = 4  # of a prompt with its answer: begin, prompt, answer, end; bounds the preferences of a row


def scores(
    params: Any, batch: dict[str, Array], config: Config, micro_batches: int = 1
) -> tuple[Array, dict[str, Array]]:
    """(scores at every position, float32 [B, T]; the layers' statistics), from float32 parameters.

    micro_batches: how many micro-batches the rows hold, for a pipeline; each of its stages returns a part of T.
    """
    out, w_score_D = transformer.forward_masters(
        params,
        batch,
        model=config.model,
        compute=config.compute,
        mesh=config.mesh,
        micro_batches=micro_batches,
    )
    return out.hidden_BTD.astype(jnp.float32) @ w_score_D, out.statistics


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
    """One micro-batch's part of a step's loss and metrics, by the convention of `training.loss.loss`.

    batch: the leaves of `PreferenceRows`. Metrics: `preference_loss`; `accuracy`, the share of pairs whose better
    answer scores higher (for scored answers, the share within 0.5 of their value); `lead`, the better answer's score
    minus the other's; `tokens`, the number of preferences; the balance losses. No tokens are dropped.
    """
    del exempt_B
    mesh, (_, t) = config.mesh, batch["ends_BT"].shape
    score_BT, statistics = scores(params, batch, config, micro_batches)
    if mesh.size(*PIPELINE) > 1:
        batch = {name: pipeline.part(leaf, mesh) for name, leaf in batch.items()}

    def by_preference(x_BT: Array) -> Array:
        one = functools.partial(jax.ops.segment_sum, num_segments=max(1, t * mesh.size(*CONTEXT) // _MIN_TOKENS))
        # The ends of the two answers may be on different devices.
        return collectives.add(jax.vmap(one)(x_BT, batch["pairs_BT"]), (*CONTEXT, *PIPELINE), mesh)

    lead_BP = by_preference(score_BT * batch["ends_BT"])
    value_BP, weight_BP = by_preference(batch["values_BT"]), by_preference(batch["weights_BT"])
    pair_BP = by_preference((batch["ends_BT"] < 0).astype(jnp.float32)) > 0
    each_BP = jnp.where(pair_BP, jax.nn.softplus(value_BP - lead_BP), (lead_BP - value_BP) ** 2)
    right_BP = jnp.where(pair_BP, lead_BP > 0, jnp.abs(lead_BP - value_BP) < 0.5)
    copies = mesh.size(*SAME_BATCH)  # devices that hold the same preferences

    def mean(x_BP: Array) -> Array:
        return (x_BP * weight_BP).sum() / (total_weight * copies)

    metrics = {
        "preference_loss": mean(each_BP),
        "accuracy": mean(right_BP.astype(jnp.float32)),
        "lead": mean(lead_BP),
        "tokens": weight_BP.sum() / copies,
    }
    return balanced(metrics["preference_loss"], metrics, statistics, share)


def evaluate(
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    config: Config,
    place: BatchPlacement | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Means of the metrics of `loss` over all preferences, their number, and with experts `load_LE` as in the loss."""
    sums = perplexity.sums(params, batches, config=config, place=place, mesh=mesh, loss=loss)
    count = sums.pop("tokens")
    means = {name: float(sums[name]) / count for name in ("preference_loss", "accuracy", "lead")}
    loads = {"load_LE": np.asarray(sums["load_LE"]) / count} if "load_LE" in sums else {}
    return means | {"preferences": int(count)} | loads


STAGE = Stage(
    name="reward model",
    loss=loss,
    evaluate=evaluate,
    data=pretraining.data,
    parameters=loading.start_params,
    headline="accuracy",
    head="score",
)
