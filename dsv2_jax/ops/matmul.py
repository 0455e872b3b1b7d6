"""Matrix products with weights: operands keep their dtype, sums are float32, results have the activations' dtype."""

import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.ops.cpu import matmul as cpu
from dsv2_jax.ops.cpu.matmul import dot, weight_gradient
from dsv2_jax.ops.switch import on_cpu
from pallas_kernels.quantized import Quantized, Weight

__all__ = ["dequantize", "dot", "project", "weight_gradient"]


def dequantize(w: Weight, dtype: jnp.dtype) -> Array:
    """A quantized weight as an array of `dtype`; any other weight unchanged."""
    return (w.values.astype(jnp.float32) * w.scale).astype(dtype) if isinstance(w, Quantized) else w


def project(x: Array, w: Weight, axes: int = 1) -> Array:
    """Contracts the last `axes` dimensions of x with the first `axes` of w; float32 sums, the result in x's dtype.

    The first `axes` dimensions of a quantized w share their scales, so the scales multiply the result.
    """
    if isinstance(w, Quantized):
        y = project(x, w.values.astype(x.dtype), axes)
        return (y.astype(jnp.float32) * w.scale.reshape(w.scale.shape[axes:])).astype(x.dtype)
    if on_cpu():
        return cpu.project(x, w, axes)
    dims = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)
