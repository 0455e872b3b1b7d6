"""Quantized rows of a cache: int8, or 6-bit integers packed in uint8, with two scales in each 32-bit word.

Four 6-bit integers fill three bytes. Three of them take the upper six bits of a byte each; the fourth is split into the
three remaining pairs of bits. The four are a quarter of the row apart, so packing moves contiguous quarters and
interleaves nothing. Unpacking sets the lower two bits of each byte to 0. As an int8 such a byte is four times its
integer, and the scales include this factor.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def is_packed(dtype: Any) -> bool:
    """Whether a cache in this dtype holds integers with scales."""
    return dtype in (jnp.int8, jnp.uint8)


def bits(dtype: Any) -> int:
    """Bits of a number in a cache of this dtype, without its scale."""
    return 6 if dtype == jnp.uint8 else 8 * jnp.dtype(dtype).itemsize


def width(size: int, dtype: Any) -> int:
    """Stored size of a row of `size` numbers. Raises ValueError for 6 bits if 4 does not divide the size."""
    if dtype != jnp.uint8:
        return size
    if size % 4:
        raise ValueError(f"rows of {size} cannot be packed in 6 bits: 4 must divide their size")
    return size // 4 * 3


def pack(integers: Array) -> Array:
    """Integers -32 to 31, int32 [..., W], in 6 bits: uint8 [..., 3 W / 4]."""
    first, second, third, fourth = jnp.split(integers & 63, 4, axis=-1)
    parts = (first << 2 | fourth >> 4, second << 2 | fourth >> 2 & 3, third << 2 | fourth & 3)
    return jnp.concatenate(parts, axis=-1).astype(jnp.uint8)


def unpack(packed: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """The quarters of packed rows, as bytes that are four times the integers in two's complement.

    axis: the axis of a row. Bytes are uint8, or four in a uint32, in any order that does not mix thirds of a row.
    """

    def each(byte: int) -> Array:
        return jnp.asarray(byte * (0x01010101 if packed.dtype == jnp.uint32 else 1), packed.dtype)

    first, second, third = jnp.split(packed, 3, axis=axis)
    fourth = (first & each(3)) << 6 | (second & each(3)) << 4 | (third & each(3)) << 2
    return first & each(0xFC), second & each(0xFC), third & each(0xFC), fourth


def pair(first: Array, second: Array) -> Array:
    """Two positive float16 scales in one uint32 word; they must not be subnormal."""
    low, high = (lax.bitcast_convert_type(scale, jnp.uint16).astype(jnp.uint32) for scale in (first, second))
    return low | high << 16


def scales(words: Array, stored: Any) -> tuple[Array, Array]:
    """The two scales of each word in float32, for bytes: for 6-bit integers (uint8) a quarter of the stored scale.

    Any word gives finite scales, because unwritten slots may have any values.
    """
    bias = jnp.uint32((110 if stored == jnp.uint8 else 112) << 23)
    low, high = (
        # Moves exponent and mantissa to float32's position and bias: the TPU has no float16.
        lax.bitcast_convert_type(((half & 0x7FFF) << 13) + bias, jnp.float32)
        for half in (words, words >> 16)
    )
    return low, high


def dequantize(stored: Array, scale: Array, axis: int = -1) -> Array:
    """Float32 rows from int8 or packed uint8. axis: the axis of a row; the scale, from `scales`, lacks it."""
    if stored.dtype == jnp.uint8:
        stored = lax.bitcast_convert_type(jnp.concatenate(unpack(stored, axis), axis), jnp.int8)
    return stored.astype(jnp.float32) * jnp.expand_dims(scale, axis)
