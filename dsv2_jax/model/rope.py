"""RoPE's angles with YaRN (section 3.1.4), exact at any position, and the softmax scale that YaRN sets."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax.config import Model, Rope

_STRIDE = 256


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """The angle in radians by which one position rotates each pair of dimensions: float64 [width / 2].

    YaRN keeps the frequency of pairs that complete more than `beta_fast` rotations over the original length, divides
    it by `factor` for pairs that complete fewer than `beta_slow`, and interpolates linearly by index between these.
    The kind `linear` divides all frequencies by `factor`.
    """
    plain = rope.theta ** (-np.arange(0, width, 2) / width)
    if rope.kind == "linear":
        return plain / rope.factor

    def index_of(rotations: float) -> float:
        return (
            width
            * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(index_of(rope.beta_fast)), 0)
    high = min(math.ceil(index_of(rope.beta_slow)), width - 1)
    interpolated = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - interpolated) + plain / rope.factor * interpolated


def mscale(factor: float, m: float) -> float:
    """YaRN's attention temperature sqrt(t) = 0.1 m ln(factor) + 1; 1 for a factor of at most 1."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(model: Model) -> float:
    """1 / sqrt(d_h + d_h^R) of eq. 18, times the squared temperature of `mscale_all_dim`."""
    temperature = mscale(model.rope.factor, model.rope.mscale_all_dim)
    return model.attention.qk_head_dim**-0.5 * temperature * temperature


def phases(model: Model, positions_BT: Array) -> tuple[Array, Array]:
    """cos and sin of each pair's angle, float32 [B, T, rope width / 2], at int32 positions below the model's maximum.

    At 128K a float32 product of position and frequency is off by hundredths of a radian. So the position is split into
    a multiple of 256 and a remainder. Small tables computed in float64 give cos and sin of both, and the addition
    theorem gives those of the sum.
    """
    angles = frequencies(model.rope, model.attention.qk_rope_head_dim)
    coarse = np.arange(-(-model.max_position_embeddings // _STRIDE))[:, None] * (_STRIDE * angles)
    fine = np.arange(_STRIDE)[:, None] * angles
    length = mscale(model.rope.factor, model.rope.mscale) / mscale(model.rope.factor, model.rope.mscale_all_dim)

    def look_up(table: np.ndarray, index_BT: Array) -> Array:
        return jnp.asarray(table, jnp.float32)[index_BT]

    high_BT, low_BT = positions_BT // _STRIDE, positions_BT % _STRIDE
    cos_a, sin_a = look_up(np.cos(coarse) * length, high_BT), look_up(np.sin(coarse) * length, high_BT)
    cos_b, sin_b = look_up(np.cos(fine), low_BT), look_up(np.sin(fine), low_BT)
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
