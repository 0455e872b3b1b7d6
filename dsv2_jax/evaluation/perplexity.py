"""Language modelling on text that the model has not seen: perplexity and bits per byte (section 3.2.1)."""

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
from dsv2_jax.parallel.feed import Feed
from dsv2_jax.training.loss import loss


def evaluate(
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    config: Config,
    feed: Feed | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Means over all weighted targets of the batches; nothing is dropped and no balance loss counts.

    Batches [B, T] are this process's rows, which `feed` puts on the mesh if there is one. Returns `nll` (nats per
    token), `perplexity`, `bits_per_byte` (comparable between tokenizers: nats of all targets, ends of documents
    included, over the UTF-8 bytes they stand for), `tokens`, `bytes`, and with experts `load_LE`, each expert's share
    of the choices times E. Raises ValueError when the batches hold no target.
    """
    nll, load_LE, tokens, text_bytes = 0.0, 0.0, 0.0, 0.0
    for batch in batches:
        one = {name: leaf[None] for name, leaf in batch.items()}
        one = feed(one) if feed else one
        figures = jax.device_get(_sums(params, one, config=config, mesh=mesh))
        nll += float(figures["nll"])
        load_LE = load_LE + figures.get("load_LE", 0.0) * float(figures["tokens"])
        tokens += float(figures["tokens"])
        text_bytes += float(figures["bytes"])
    if not tokens:
        raise ValueError("the text to evaluate is empty: it holds no token to predict")
    mean = nll / tokens
    result = {
        "nll": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": nll / math.log(2) / text_bytes,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
    }
    return result | ({"load_LE": np.asarray(load_LE / tokens)} if np.ndim(load_LE) else {})


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _sums(
    params: Any, batch: dict[str, jax.Array], *, config: Config, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.Array]:
    config = config if mesh else dataclasses.replace(config, mesh=SINGLE)

    def sums(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        one = {name: leaf[0] for name, leaf in batch.items()}
        _, metrics = loss(params, one, config=config, exempt_B=None, total_weight=1.0, share=1.0)
        return {name: collectives.add(value, AXES, config.mesh) for name, value in metrics.items()}

    if mesh is None:
        return sums(params, batch)
    specs = sharding.param_specs(config.model, config.mesh), {name: sharding.batch_spec(name) for name in batch}
    return jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(params, batch)
