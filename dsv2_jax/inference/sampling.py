"""Choosing the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy. top_p keeps the fewest tokens whose probabilities reach it; 1 keeps all."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check(self.temperature >= 0, f"temperature must not be negative, not {self.temperature}")
        check(0 < self.top_p <= 1, f"top_p must lie above 0 and at most at 1, not {self.top_p}")


def sample(logits_BW: Array, key: Array, sampling: Sampling) -> Array:
    """Token ids int32 [B] drawn from logits [B, W]; the key is not used when greedy."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    logits_BW = logits_BW.astype(jnp.float32) / sampling.temperature
    if sampling.top_p < 1:
        sorted_BW = jnp.sort(logits_BW, axis=-1, descending=True)
        before_BW = jnp.cumsum(jax.nn.softmax(sorted_BW, axis=-1), axis=-1) - jax.nn.softmax(sorted_BW, axis=-1)
        least_B1 = jnp.where(before_BW < sampling.top_p, sorted_BW, jnp.inf).min(axis=-1, keepdims=True)
        logits_BW = jnp.where(logits_BW >= least_B1, logits_BW, -jnp.inf)
    return jax.random.categorical(key, logits_BW, axis=-1).astype(jnp.int32)
