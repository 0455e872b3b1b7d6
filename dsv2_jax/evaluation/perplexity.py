"""Language modelling on text that the model has not seen: perplexity and bits per byte (section 3.2.1)."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dsv2_jax.config import Config
from dsv2_jax.training.loss import loss


def evaluate(
    params: Any, batches: Iterable[dict[str, np.ndarray]], *, config: Config, bytes_per_token: np.ndarray
) -> dict[str, Any]:
    """Means over all weighted targets of the batches; nothing is dropped and no balance loss counts.

    Returns `nll` (nats per token), `perplexity`, `bits_per_byte` (comparable between tokenizers: nats of all targets,
    ends of documents included, over the UTF-8 bytes they stand for), `tokens`, `bytes`, and with experts `load_LE`,
    each expert's share of the choices times E. Raises ValueError when the batches hold no target.
    """
    nll, load_LE, tokens, text_bytes = 0.0, 0.0, 0.0, 0
    for batch in batches:
        figures = jax.device_get(_sums(params, batch, config=config))
        weight = float(batch["weights_BT"].sum())
        nll += float(figures["nll"])
        load_LE = load_LE + figures.get("load_LE", 0.0) * weight
        tokens += weight
        text_bytes += int((bytes_per_token[batch["targets_BT"]] * (batch["weights_BT"] > 0)).sum())
    if not tokens:
        raise ValueError("the text to evaluate is empty: it holds no token to predict")
    mean = nll / tokens
    result = {
        "nll": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": nll / math.log(2) / text_bytes,
        "tokens": int(tokens),
        "bytes": text_bytes,
    }
    return result | ({"load_LE": np.asarray(load_LE / tokens)} if np.ndim(load_LE) else {})


@functools.partial(jax.jit, static_argnames="config")
def _sums(params: Any, batch: dict[str, jax.Array], *, config: Config) -> dict[str, jax.Array]:
    _, metrics = loss(params, batch, config=config, exempt_B=None, total_weight=1.0, share=1.0)
    return metrics
