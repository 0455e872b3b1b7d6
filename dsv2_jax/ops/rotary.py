"""RoPE applied to queries and keys (eq. 14 and 15): pairs of numbers, each rotated by its angle."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.ops.matmul import project
from dsv2_jax.ops.switch import on_cpu
from pallas_kernels.quantized import Weight


def rotate(x_BTR: Array, phases_BTR: tuple[Array, Array]) -> Array:
    """Rotates the neighbouring pairs (x0, x1), (x2, x3), ... of the last dimension, in x's dtype.

    x: [B, T, R] or [B, T, H, R]. phases: cos and sin, float32 [B, T, R / 2]. The result holds all first
    components, then all second ones. Queries and keys share that order, so their product does not depend on it.
    """
    phases = phases_BTR if x_BTR.ndim == 3 else tuple(p[:, :, None] for p in phases_BTR)
    return _rotate(x_BTR[..., 0::2], x_BTR[..., 1::2], phases, -1)


def project_and_rotate(x_BTX: Array, w_XHR: Weight, phases_BTR: tuple[Array, Array]) -> Array:
    """`rotate` of `project(x, w)`, [B, T, H, R] in x's dtype.

    R numbers fill half of a TPU's vector register, so there heads come last until the pairs are rotated. Separating
    pairs that are neighbours in memory would cost a matrix product, so the weights' columns are separated instead,
    unless there are fewer tokens than rows of the weights, as in generation.
    """
    if on_cpu() or math.prod(x_BTX.shape[:-1]) < w_XHR.shape[0]:
        return rotate(project(x_BTX, w_XHR), phases_BTR)
    w_XRH = jax.tree.map(lambda w: jnp.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1).swapaxes(1, 2), w_XHR)
    first, second = jnp.split(project(x_BTX, w_XRH), 2, axis=2)
    return _rotate(first, second, tuple(p[..., None] for p in phases_BTR), 2).swapaxes(2, 3)


def _rotate(first: Array, second: Array, phases: tuple[Array, ...], axis: int) -> Array:
    (cos, sin), a, b = phases, first.astype(jnp.float32), second.astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=axis).astype(first.dtype)
