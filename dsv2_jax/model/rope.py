"""Rotary position embedding with YaRN (section 3.1.4): phases exact at any position, and the softmax scale."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax.config import Model, Rope
from dsv2_jax.model.matmul import Weight, project
from dsv2_jax.parallel.mesh import platform

_STRIDE = 256


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians a position turns each pair of dimensions by, float64 [width / 2].

    YaRN: pairs that turn more than `beta_fast` times over the original length keep their frequency, those that turn
    less than `beta_slow` times have it divided by `factor`, the ones between are blended linearly by index. Of kind
    `linear` all are divided.
    """
    plain = rope.theta ** (-np.arange(0, width, 2) / width)
    if rope.kind == "linear":
        return plain / rope.factor

    def index_of(turns: float) -> float:
        return (
            width * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low = max(math.floor(index_of(rope.beta_fast)), 0)
    high = min(math.ceil(index_of(rope.beta_slow)), width - 1)
    stretched = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched


def mscale(factor: float, m: float) -> float:
    """YaRN's attention temperature sqrt(t) = 0.1 m ln(factor) + 1; 1 where nothing is stretched."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(model: Model) -> float:
    """1 / sqrt(width of a query head), times mscale_all_dim's temperature squared."""
    temperature = mscale(model.rope.factor, model.rope.mscale_all_dim)
    return model.attention.qk_head_dim**-0.5 * temperature * temperature


def phases(model: Model, positions_BT: Array) -> tuple[Array, Array]:
    """cos and sin of every pair's angle, float32 [B, T, rope width / 2], for int32 positions below the model's maximum.

    A float32 product of position and frequency is off by hundredths of a radian at 128K. So the position is split
    into a multiple of 256 and a rest, each looked up in a small table made in float64, and the angles are added by the
    addition theorem.
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


def rotate(x_BTR: Array, phases_BTR: tuple[Array, Array]) -> Array:
    """Turns neighbouring pairs (x0, x1), (x2, x3), ... of the last dimension; [B, T, R] or [B, T, H, R], x's dtype.

    The result holds all first components, then all second ones. Queries and keys are turned alike, so their product
    does not see that order, and no interleaving is paid for.
    """
    phases = phases_BTR if x_BTR.ndim == 3 else tuple(p[:, :, None] for p in phases_BTR)
    return _turn(x_BTR[..., 0::2], x_BTR[..., 1::2], phases, -1)


def rotated(x_BTX: Array, w_XHR: Weight, phases_BTR: tuple[Array, Array]) -> Array:
    """`rotate` of `project(x, w)`, [B, T, H, R] in x's dtype.

    On TPU heads come last until the pairs are turned: R numbers fill half a vector register, and pairs that lie side by
    side would be parted by a matrix product. There the weights' columns are parted instead, unless the tokens are fewer
    than the rows of the weights, as in generation.
    """
    if platform() == "cpu" or math.prod(x_BTX.shape[:-1]) < w_XHR.shape[0]:
        return rotate(project(x_BTX, w_XHR), phases_BTR)
    w_XRH = jax.tree.map(lambda w: jnp.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1).swapaxes(1, 2), w_XHR)
    first, second = jnp.split(project(x_BTX, w_XRH), 2, axis=2)
    return _turn(first, second, tuple(p[..., None] for p in phases_BTR), 2).swapaxes(2, 3)


def _turn(first: Array, second: Array, phases: tuple[Array, ...], axis: int) -> Array:
    (cos, sin), a, b = phases, first.astype(jnp.float32), second.astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=axis).astype(first.dtype)
