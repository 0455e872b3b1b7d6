"""Numbers kept in fewer bits: rows of int8 or packed 6-bit integers with one scale each, and how they come back.

A row is what one token keeps in one array of one layer's cache. Its scale is the largest magnitude over the largest
integer, rounded up to float16, so nothing is clipped. Four 6-bit integers fill three bytes: the fourth is cut into
three pairs of bits, which fill up the bytes of the other three. The four lie a quarter of the row apart, so packing
moves whole runs and nothing is interleaved.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

Format = Literal["compute", "bfloat16", "int8", "int6"]  # compute: the dtype of activations

_LARGEST = {"int8": 127, "int6": 31}


def is_quantized(form: Format) -> bool:
    """Whether rows of this format have scales."""
    return form in _LARGEST


def width(size: int, form: Format) -> int:
    """Stored numbers for a row of `size`. Raises ValueError for 6 bits of a size that 4 does not divide."""
    if form != "int6":
        return size
    if size % 4:
        raise ValueError(f"rows of {size} cannot be packed in 6 bits: 4 must divide their size")
    return size // 4 * 3


def quantize(x: Array, form: Format) -> tuple[Array, Array]:
    """Rows [..., W] as stored rows (int8 [..., W] or uint8 [..., 3 W / 4]) and float16 scales [...]."""
    largest = _LARGEST[form]
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, 2.0**-14)
    rounded = scale.astype(jnp.float16)
    up = jnp.nextafter(rounded, jnp.float16(jnp.inf))
    scale = jnp.where(rounded.astype(jnp.float32) < scale, up, rounded)
    whole = jnp.round(x / scale.astype(jnp.float32)[..., None]).astype(jnp.int32)
    return (whole.astype(jnp.int8) if form == "int8" else _pack(whole + 32)), scale


def dequantize(stored: Array, scale: Array, form: Format, axis: int = -1) -> Array:
    """Float32 rows, the inverse of `quantize` up to rounding. `axis` is where a row lies; scale lacks that axis."""
    whole = stored.astype(jnp.int32) if form == "int8" else _unpack(stored, axis) - 32
    return whole.astype(jnp.float32) * jnp.expand_dims(scale.astype(jnp.float32), axis)


def _pack(whole: Array) -> Array:
    first, second, third, fourth = jnp.split(whole, 4, axis=-1)
    parts = (first | (fourth & 3) << 6, second | (fourth >> 2 & 3) << 6, third | (fourth >> 4) << 6)
    return jnp.concatenate(parts, axis=-1).astype(jnp.uint8)


def _unpack(stored: Array, axis: int) -> Array:
    first, second, third = jnp.split(stored.astype(jnp.int32), 3, axis=axis)
    fourth = (first >> 6) | (second >> 6) << 2 | (third >> 6) << 4
    return jnp.concatenate([first & 63, second & 63, third & 63, fourth], axis=axis)
