"""Perplexity and bits per byte on held-out text (section 3.2.1)."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dsv2_jax.config import AXES, SINGLE, Config
from dsv2_jax.parallel import collectives, sharding
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.training.loss import loss as pretraining_loss
from dsv2_jax.training.step import Loss


def evaluate(
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    config: Config,
    place: BatchPlacement | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Means over all weighted targets of the batches, without token dropping and balance losses.

    Batches [B, T] are this process's rows; `place` places them on the mesh. Returns `nll` (nats per token),
    `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and with experts `load_LE`, each expert's share of the choices
    times E. Bits per byte are the bits of all targets, ends of documents included, divided by their UTF-8 bytes, so
    they are comparable across tokenizers. Raises ValueError if the batches hold no target.
    """
    found = sums(params, batches, config=config, place=place, mesh=mesh, loss=pretraining_loss)
    nll, tokens, text_bytes = (float(found[name]) for name in ("nll", "tokens", "bytes"))
    mean = nll / tokens
    result = {
        "nll": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": nll / math.log(2) / text_bytes,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
    }
    return result | ({"load_LE": np.asarray(found["load_LE"]) / tokens} if "load_LE" in found else {})


def sums(
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    config: Config,
    place: BatchPlacement | None,
    mesh: jax.sharding.Mesh | None,
    loss: Loss,
) -> dict[str, Any]:
    """The metrics of `loss`, summed over the batches in float64; `load_LE` is weighted by each batch's targets.

    Raises ValueError if the batches hold no target.
    """
    total: dict[str, Any] = {}
    for batch in batches:
        one = {name: leaf[None] for name, leaf in batch.items()}
        one = place(one) if place else one
        figures = jax.device_get(sums_of_batch(params, one, config=config, mesh=mesh, loss=loss))
        figures = {name: np.asarray(x, np.float64) for name, x in figures.items()}
        if "load_LE" in figures:
            figures["load_LE"] = figures["load_LE"] * figures["tokens"]
        total = {name: total.get(name, 0) + x for name, x in figures.items()}
    if not total.get("tokens"):
        raise ValueError("there is nothing to evaluate: the data hold no token to predict and no answer to score")
    return total


@functools.partial(jax.jit, static_argnames=("config", "mesh", "loss"))
def sums_of_batch(
    params: Any, batch: dict[str, jax.Array], *, config: Config, mesh: jax.sharding.Mesh | None, loss: Loss
) -> dict[str, jax.Array]:
    """The metrics of `loss` over one batch with leaves [1, B, T], laid out on the mesh as in a training step."""
    config = config if mesh else dataclasses.replace(config, mesh=SINGLE)

    def one_batch(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        one = {name: leaf[0] for name, leaf in batch.items()}
        _, metrics = loss(params, one, config=config, exempt_B=None, total_weight=1.0, share=1.0)
        return {name: collectives.add(value, AXES, config.mesh) for name, value in metrics.items()}

    if mesh is None:
        return one_batch(params, batch)
    specs = sharding.param_specs(config.model, config.mesh), {name: sharding.batch_spec(name) for name in batch}
    return jax.shard_map(one_batch, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(
        params, batch
    )
