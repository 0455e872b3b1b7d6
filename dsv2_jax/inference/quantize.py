"""8-bit weights with a scale per output channel, computed from the weights alone (section 3.2.3)."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax import parameters
from pallas_kernels.quantized import Quantized

Weights = Literal["compute", "int8", "float8"]

_LARGEST = {"int8": 127.0, "float8": 448.0}  # largest value of each format; float8_e4m3fn has no infinity


def quantize(unstacked: Any, kind: Weights) -> Any:
    """Quantizes the matrices of the tree of `transformer.unstack`, but not norms, router and embedding.

    int8 rounds to the nearest of 255 levels per channel, float8 to 4 significant bits.
    """

    return jax.tree_util.tree_map_with_path(lambda path, w: leaf(path[-1].key, w, kind), unstacked)


@functools.partial(jax.jit, static_argnames=("name", "kind"))
def leaf(name: str, w: Array, kind: Weights) -> Array | Quantized:
    """Quantizes one parameter of the unstacked tree, if it is a matrix to quantize."""
    return w if name.startswith(parameters.KEPT_FLOAT32) else channelwise(w, contracted(name), kind)


def contracted(name: str) -> tuple[int, ...]:
    """The dimensions that the matmul of a parameter contracts; the others are its output channels."""
    if name == "w_o_HVD":
        return 0, 1
    return (1,) if parameters.per_expert(name) else (0,)


def channelwise(w: Array, axes: tuple[int, ...], kind: Weights) -> Quantized:
    """Quantizes w with scales that are shared along `axes`."""
    w, largest = w.astype(jnp.float32), _LARGEST[kind]
    scale = jnp.maximum(jnp.max(jnp.abs(w), axis=axes, keepdims=True) / largest, 1e-30)
    values = jnp.clip(w / scale, -largest, largest)
    stored = jnp.round(values).astype(jnp.int8) if kind == "int8" else values.astype(jnp.float8_e4m3fn)
    return Quantized(stored, scale)
