"""Matrix products for CPUs: operands in the layout that XLA's CPU library multiplies fast, bfloat16 copied as bits.

On other devices each function is the plain operation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.ops.switch import on_cpu

_TRANSPOSED_ROWS = 1024  # rows that weight_gradient transposes at a time


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product over dimension contract[0] of a and contract[1] of b: float32 sums, a float32 result."""
    if a.dtype == jnp.bfloat16 and a.shape[1 - contract[0]] == 1 and on_cpu():
        a = jnp.concatenate([a, jnp.zeros_like(a)], axis=1 - contract[0])  # with one row XLA would widen all of b
        return lax.slice_in_dim(dot(a, b, contract), 0, 1)
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def to_bits(x: Array) -> Array:
    """On CPU a bfloat16 array as its uint16 bits, to be gathered, sliced or updated; any other array unchanged.

    To copy some rows of a bfloat16 buffer, XLA's CPU backend first converts all of it to float32. It copies integers as
    they are. On TPU the cast would itself be a copy.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and on_cpu() else x


def from_bits(x: Array) -> Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def weight_gradient(x_ND: Array, g_NF: Array) -> Array:
    """x^T g in float32, [D, F].

    XLA's CPU library multiplies bfloat16 at full speed only if both operands are row-major, so x is transposed first.
    This is done for some rows at a time, because columns of many rows do not fit in the CPU's cache.
    """
    if x_ND.dtype != jnp.bfloat16 or not on_cpu():
        return dot(x_ND, g_NF, (0, 0))
    parts = range(0, x_ND.shape[0], _TRANSPOSED_ROWS)
    return sum(dot(transpose(x_ND[i : i + _TRANSPOSED_ROWS]), g_NF[i : i + _TRANSPOSED_ROWS]) for i in parts)  # pyright: ignore


def transpose(x_ND: Array) -> Array:
    """x^T. On CPU it is row-major, and a barrier prevents XLA from folding it into the product that reads it."""
    n, d = x_ND.shape
    if not on_cpu() or (x_ND.dtype == jnp.bfloat16 and d % 2):
        return x_ND.T
    if x_ND.dtype != jnp.bfloat16:
        return lax.optimization_barrier(x_ND.T)
    # XLA transposes 32-bit words five times as fast as 16-bit ones: transpose pairs of columns, then separate them.
    pairs = lax.bitcast_convert_type(x_ND.reshape(n, d // 2, 2), jnp.uint32).T
    rows = jnp.stack([pairs & 0xFFFF, pairs >> 16], axis=1).astype(jnp.uint16).reshape(d, n)
    return lax.bitcast_convert_type(rows, jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Array, w: Array, axes: int) -> Array:
    """`ops.matmul.project` of an array as one matrix product, with `weight_gradient` in its backward pass."""
    return _project_fwd(x, w, axes)[0]


def _flat(x: Array, leading: int) -> Array:
    return x.reshape(math.prod(x.shape[:leading]), -1)


def _project_fwd(x: Array, w: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    y = dot(_flat(x, x.ndim - axes), _flat(w, axes)).astype(x.dtype)
    return y.reshape(x.shape[: x.ndim - axes] + w.shape[axes:]), (x, w)


def _project_bwd(axes: int, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    leading = x.ndim - axes
    g_NF, w_DF = _flat(g, leading), _flat(w, axes)
    dx = dot(g_NF, w_DF, (1, 1)).astype(x.dtype)
    dw = weight_gradient(_flat(x, leading), g_NF).astype(w.dtype)
    return dx.reshape(x.shape), dw.reshape(w.shape)


project.defvjp(_project_fwd, _project_bwd)
