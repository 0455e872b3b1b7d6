"""Plain generation from the latent cache: one batch of prompts, prefilled once, then a token a step for every row."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax.config import Compute, Model, check
from dsv2_jax.inference.sampling import Sampling, sample
from dsv2_jax.model import cache as caches
from dsv2_jax.model import transformer
from dsv2_jax.model.layers import cast, compute_dtype

_BUCKET = 64  # prompts are padded, and the cache is sized, in multiples of this: few lengths, few compilations


def prepare(params: Any, compute: Compute) -> Any:
    """Parameters as `generate` reads them: unstacked, matrices in the compute dtype."""
    return cast(transformer.unstack(params), compute_dtype(compute))


def generate(
    prepared: Any,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    *,
    model: Model,
    compute: Compute,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt, int32 [B], up to `max_new` times; stop asking to stop.

    `prepared` comes from `prepare`. Prompts may differ in length: shorter ones are padded on the left, and padding is
    seen by nobody. Raises ValueError for an empty prompt, an id outside the vocabulary, or more tokens than the model
    has positions.
    """
    lengths = [len(prompt) for prompt in prompts]
    check(min(lengths, default=0) > 0, "a prompt holds no token")
    check(max_new > 0, f"max-new must be positive, not {max_new}")
    highest, lowest = max(map(max, prompts)), min(map(min, prompts))
    check(
        lowest >= 0 and highest < model.vocab_size,
        f"prompt ids must lie in 0 to {model.vocab_size - 1}, the model's vocabulary; found {lowest} to {highest}",
    )
    check(
        max(lengths) + max_new <= model.max_position_embeddings,
        f"{max(lengths)} prompt tokens and {max_new} new ones exceed the model's {model.max_position_embeddings} "
        "positions",
    )
    width = _round_up(max(lengths))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
        segments_BT[row, width - len(prompt) :] = 1
    positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0)

    cache = caches.empty(model, len(prompts), _round_up(width + max_new), compute_dtype(compute))
    step = functools.partial(_step, model=model, compute=compute, sampling=sampling)
    key = jax.random.key(seed)
    inputs: tuple = (tokens_BT, positions_BT, segments_BT)
    position_B1 = jnp.asarray(lengths, jnp.int32)[:, None]
    for i in range(max_new):
        next_B1, cache = step(prepared, *inputs, cache, jax.random.fold_in(key, i), prefill=i == 0)
        yield np.asarray(next_B1[:, 0])
        inputs = (next_B1, position_B1 + i, jnp.ones_like(next_B1))


@functools.partial(jax.jit, static_argnames=("model", "compute", "sampling", "prefill"), donate_argnames="cache")
def _step(
    prepared: Any,
    tokens_BT: Array,
    positions_BT: Array,
    segments_BT: Array,
    cache: caches.Cache,
    key: Array,
    *,
    model: Model,
    compute: Compute,
    sampling: Sampling,
    prefill: bool,
) -> tuple[Array, caches.Cache]:
    net = transformer.Transformer(model, compute, unrolled=True)
    out: Any = net.apply({"params": prepared}, tokens_BT, positions_BT, segments_BT, cache=cache, prefill=prefill)
    logits_B1W = transformer.logits(prepared, out.hidden_BTD[:, -1:])
    return sample(logits_B1W[:, 0], key, sampling)[:, None], out.cache


def _round_up(n: int) -> int:
    return -(-n // _BUCKET) * _BUCKET
