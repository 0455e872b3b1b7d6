"""Products with weights: the one place that says in which precision they run and how their gradients are laid out.

Operands keep their dtype, sums are float32, results come back in the activation's dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.parallel.mesh import platform
from pallas_kernels.quantized import Quantized, Weight

_TRANSPOSED_ROWS = 1024


def whole(w: Weight, dtype: jnp.dtype) -> Array:
    """A weight as an array of this dtype; one that is none already is converted."""
    return (w.values.astype(jnp.float32) * w.scale).astype(dtype) if isinstance(w, Quantized) else w


def project(x: Array, w: Weight, axes: int = 1) -> Array:
    """Contracts the last `axes` dimensions of x with the first `axes` of w: float32 sums, the result in x's dtype.

    Of a quantized w the first `axes` dimensions share their scales, which then multiply the result.
    """
    if isinstance(w, Quantized):
        y = project(x, w.values.astype(x.dtype), axes)
        return (y.astype(jnp.float32) * w.scale.reshape(w.scale.shape[axes:])).astype(x.dtype)
    if platform() == "cpu":
        return _project_cpu(x, w, axes)
    return _dot(x, w, axes)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product over a's and b's named dimension, accumulated and returned in float32."""
    if a.dtype == jnp.bfloat16 and a.shape[1 - contract[0]] == 1 and platform() == "cpu":
        a = jnp.concatenate([a, jnp.zeros_like(a)], axis=1 - contract[0])  # of one row, XLA widens the whole of b
        return lax.slice_in_dim(dot(a, b, contract), 0, 1)
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def to_bits(x: Array) -> Array:
    """On CPU bfloat16 as its bits, any other dtype as it is. XLA has no bfloat16 there but in products: it widens a
    whole buffer to update or gather some rows of it. Bits it moves as they are. On TPU it would copy them."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and platform() == "cpu" else x


def from_bits(x: Array) -> Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def weight_gradient(x_ND: Array, g_NF: Array) -> Array:
    """x^T g in float32 [D, F].

    XLA's CPU library multiplies bfloat16 at full speed only when both operands are row-major; otherwise it widens them
    first. So there the transpose is made, of some rows at a time: columns of many rows fall out of the cache.
    """
    if x_ND.dtype != jnp.bfloat16 or platform() != "cpu":
        return dot(x_ND, g_NF, (0, 0))
    parts = range(0, x_ND.shape[0], _TRANSPOSED_ROWS)
    return sum(dot(transpose(x_ND[i : i + _TRANSPOSED_ROWS]), g_NF[i : i + _TRANSPOSED_ROWS]) for i in parts)  # pyright: ignore


def transpose(x_ND: Array) -> Array:
    """x^T; on CPU row-major in memory, kept from folding back into the product it is for."""
    n, d = x_ND.shape
    if platform() != "cpu" or (x_ND.dtype == jnp.bfloat16 and d % 2):
        return x_ND.T
    if x_ND.dtype != jnp.bfloat16:
        return lax.optimization_barrier(x_ND.T)
    # XLA transposes 32-bit words five times as fast as 16-bit ones: turn pairs of columns, then part them.
    pairs = lax.bitcast_convert_type(x_ND.reshape(n, d // 2, 2), jnp.uint32).T
    rows = jnp.stack([pairs & 0xFFFF, pairs >> 16], axis=1).astype(jnp.uint16).reshape(d, n)
    return lax.bitcast_convert_type(rows, jnp.bfloat16)


def _dot(x: Array, w: Array, axes: int) -> Array:
    dims = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project_cpu(x: Array, w: Array, axes: int) -> Array:
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


_project_cpu.defvjp(_project_fwd, _project_bwd)
