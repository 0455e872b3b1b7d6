"""Sampling the next token of every row from its logits. Every row has its own settings."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv2_jax.config import check

_MAX_EXACT = 2**24  # float32 is exact for integers up to here
_MIN_TEMPERATURE = 1e-5  # logits divided by a lower temperature would overflow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings, applied in this order: repetition penalty and bias, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # number of most probable tokens to keep; 0: all
    top_p: float = 1.0  # keep the fewest most probable tokens whose sum reaches this; 1: all
    min_p: float = 0.0  # keep tokens of at least this fraction of the highest probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen before, multiplies others
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value added to its logit)

    def __post_init__(self) -> None:
        check(
            0 <= self.temperature < float("inf"), f"temperature must be finite and at least 0, not {self.temperature}"
        )
        check(0 <= self.top_k < _MAX_EXACT, f"top_k must be from 0 to {_MAX_EXACT - 1}, not {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        check(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")
        check(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty must be finite and positive, not {self.repetition_penalty}",
        )
        check(
            all(abs(bias) < float("inf") for _, bias in self.logit_bias),
            "logit_bias must be finite: -100 already bans a token",
        )

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature."""
        return self.repetition_penalty != 1 or bool(self.logit_bias)


class RowSettings(NamedTuple):
    """Sampling settings of N rows, float32 or integers [N]. time_N: the position of the token to draw."""

    temperature_N: Array | np.ndarray
    top_k_N: Array | np.ndarray
    top_p_N: Array | np.ndarray
    min_p_N: Array | np.ndarray
    penalty_N: Array | np.ndarray
    seed_N: Array | np.ndarray
    time_N: Array | np.ndarray


class Adjust(NamedTuple):
    """Inputs of the repetition penalty and the bias. seen_NW bool: the row has this token. bias_NW float32."""

    seen_NW: Array | np.ndarray
    bias_NW: Array | np.ndarray


def rows(settings: Sequence[Sampling], seeds: Sequence[int], times: Sequence[int], n: int) -> RowSettings:
    """The settings of these rows as host arrays, padded to n rows with greedy ones."""
    numbers = np.zeros((5, n), np.float32)
    numbers[2] = numbers[4] = 1
    integers = np.zeros((2, n), np.int64)
    for i, (s, seed, time) in enumerate(zip(settings, seeds, times, strict=True)):
        numbers[:, i] = s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty
        integers[:, i] = seed % 2**32, time
    temperature, top_k, top_p, min_p, penalty = numbers
    return RowSettings(
        temperature,
        top_k.astype(np.int32),
        top_p,
        min_p,
        penalty,
        integers[0].astype(np.uint32),
        integers[1].astype(np.int32),
    )


def sample(logits_NW: Array, rows: RowSettings, adjust: Adjust | None = None) -> Array:
    """Draws token ids int32 [N] from logits [N, W].

    A draw depends only on the logits, settings, seed and position of its row (Gumbel-max, with a key of seed and
    position). On ties the filters keep all tokens as probable as the last one kept.
    """
    logits_NW = logits_NW.astype(jnp.float32)
    if adjust is not None:
        logits_NW = adjusted(logits_NW, rows, adjust)
    greedy_N = _argmax(logits_NW)

    def draw() -> Array:
        temperature_N = jnp.where(rows.temperature_N > 0, jnp.maximum(rows.temperature_N, _MIN_TEMPERATURE), 1)
        hot_NW = logits_NW / temperature_N[:, None]
        filters = (rows.top_k_N > 0) | (rows.top_p_N < 1) | (rows.min_p_N > 0)
        hot_NW = lax.cond(jnp.any(filters & (rows.temperature_N > 0)), lambda: filtered(hot_NW, rows), lambda: hot_NW)
        keys_N = jax.vmap(lambda seed, time: jax.random.fold_in(jax.random.key(seed), time))(rows.seed_N, rows.time_N)
        noise_NW = jax.vmap(lambda key: jax.random.gumbel(key, hot_NW.shape[1:]))(keys_N)
        return _argmax(hot_NW + noise_NW)

    drawn_N = lax.cond(jnp.any(rows.temperature_N > 0), draw, lambda: greedy_N)
    return jnp.where(rows.temperature_N > 0, drawn_N, greedy_N)


def _argmax(x_NW: Array) -> Array:
    """argmax int32 [N], the first of equals; XLA's own argmax is slow on CPU."""
    places_W = jnp.arange(x_NW.shape[-1], dtype=jnp.int32)
    last = x_NW.shape[-1] - 1  # the result if a NaN hides the maximum
    return jnp.min(jnp.where(x_NW == jnp.max(x_NW, axis=-1, keepdims=True), places_W, last), axis=-1)


def adjusted(logits_NW: Array, rows: RowSettings, adjust: Adjust) -> Array:
    """Logits after the repetition penalty and the bias."""
    penalty_N1 = jnp.asarray(rows.penalty_N)[:, None]
    penalised_NW = jnp.where(logits_NW > 0, logits_NW / penalty_N1, logits_NW * penalty_N1)
    return jnp.where(adjust.seen_NW, penalised_NW, logits_NW) + adjust.bias_NW


def filtered(logits_NW: Array, rows: RowSettings) -> Array:
    """Logits with -inf for tokens that top_k, then top_p, then min_p of a row remove.

    Bisects the threshold of each row bit by bit, which is cheaper than sorting the vocabulary.
    """
    order_NW = _ordered(logits_NW)
    k_N = jnp.where(rows.top_k_N > 0, rows.top_k_N, logits_NW.shape[1])
    kept_NW = order_NW >= _threshold(order_NW, jnp.ones_like(logits_NW), k_N.astype(jnp.float32))[:, None]
    mass_NW = jnp.where(kept_NW, jnp.exp(logits_NW - jnp.max(logits_NW, axis=-1, keepdims=True)), 0)
    goal_N = jnp.where(rows.top_p_N < 1, rows.top_p_N * jnp.sum(mass_NW, axis=-1), jnp.inf)
    kept_NW &= order_NW >= _threshold(order_NW, mass_NW, goal_N)[:, None]
    kept_NW &= mass_NW >= jnp.asarray(rows.min_p_N)[:, None]
    return jnp.where(kept_NW, logits_NW, -jnp.inf)


def _ordered(x: Array) -> Array:
    """Maps float32 to uint32 so that the order is kept."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_NW: Array, mass_NW: Array, goal_N: Array) -> Array:
    """The largest threshold whose mass at or above it reaches the goal; 0, which keeps all, if there is none."""

    def set_bit(i: Array, found_N: Array) -> Array:
        try_N = found_N | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached_N = jnp.sum(jnp.where(order_NW >= try_N[:, None], mass_NW, 0), axis=-1) >= goal_N
        return jnp.where(reached_N, try_N, found_N)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros(order_NW.shape[0], jnp.uint32))
