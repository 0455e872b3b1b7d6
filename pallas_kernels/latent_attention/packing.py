"""Rows in fewer bits, as a cache keeps them: int8, or 6-bit integers in uint8, with two scales to a word.

Four 6-bit integers fill three bytes: three take the upper bits of a byte each, the fourth is cut into the pairs of bits
that are left. The four lie a quarter of the row apart, so packing moves whole runs and nothing is interleaved. Where
only its upper six bits count, a byte is an int8 four times the integer: that is what unpacking leaves, and scales are
made for it.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def is_packed(dtype: Any) -> bool:
    """Whether rows kept in this dtype are integers that have scales."""
    return dtype in (jnp.int8, jnp.uint8)


def bits(dtype: Any) -> int:
    """Of a number kept in this dtype, its scale apart."""
    return 6 if dtype == jnp.uint8 else 8 * jnp.dtype(dtype).itemsize


def width(size: int, dtype: Any) -> int:
    """Stored numbers for a row of `size`. Raises ValueError for 6 bits of a size that 4 does not divide."""
    if dtype != jnp.uint8:
        return size
    if size % 4:
        raise ValueError(f"rows of {size} cannot be packed in 6 bits: 4 must divide their size")
    return size // 4 * 3


def pack(whole: Array) -> Array:
    """Integers -32 to 31, int32 [..., W], in 6 bits: uint8 [..., 3 W / 4]."""
    first, second, third, fourth = jnp.split(whole & 63, 4, axis=-1)
    parts = (first << 2 | fourth >> 4, second << 2 | fourth >> 2 & 3, third << 2 | fourth & 3)
    return jnp.concatenate(parts, axis=-1).astype(jnp.uint8)


def unpack(packed: Array, axis: int) -> tuple[Array, Array, Array, Array]:
    """The quarters of rows that `pack` packed, as bytes that are four times the integers in two's complement.

    `axis` is where a row lies. Bytes come and go as uint8, or by fours as uint32: whichever four, if not of two thirds
    of a row.
    """

    def each(byte: int) -> Array:
        return jnp.asarray(byte * (0x01010101 if packed.dtype == jnp.uint32 else 1), packed.dtype)

    first, second, third = jnp.split(packed, 3, axis=axis)
    fourth = (first & each(3)) << 6 | (second & each(3)) << 4 | (third & each(3)) << 2
    return first & each(0xFC), second & each(0xFC), third & each(0xFC), fourth


def pair(first: Array, second: Array) -> Array:
    """Positive float16 scales two to a uint32 word; none may be subnormal."""
    low, high = (lax.bitcast_convert_type(scale, jnp.uint16).astype(jnp.uint32) for scale in (first, second))
    return low | high << 16


def scales(words: Array, stored: Any) -> tuple[Array, Array]:
    """The two scales of each word in float32, for bytes: a quarter of what they are for 6-bit integers (uint8).

    Any word gives finite ones: slots nobody filled may hold anything.
    """
    bias = jnp.uint32((110 if stored == jnp.uint8 else 112) << 23)
    low, high = (
        # To float32's place and bias, by hand: the TPU has no float16.
        lax.bitcast_convert_type(((half & 0x7FFF) << 13) + bias, jnp.float32)
        for half in (words, words >> 16)
    )
    return low, high


def dequantize(stored: Array, scale: Array, axis: int = -1) -> Array:
    """Float32 rows from int8 or packed uint8. `axis` is where a row lies; scale, of `scales`, lacks that axis."""
    if stored.dtype == jnp.uint8:
        stored = lax.bitcast_convert_type(jnp.concatenate(unpack(stored, axis), axis), jnp.int8)
    return stored.astype(jnp.float32) * jnp.expand_dims(scale, axis)
