"""Formats of the cache's rows (section 3.2.3): the activations' dtype, bfloat16, or integers with one scale per row.

A row holds one token's numbers in one array of one layer. Its scale is the largest magnitude divided by the largest
integer, rounded up to float16, so no number is clipped. pallas_kernels/latent_attention/packing.py packs and
dequantises rows.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.latent_attention import packing

Format = Literal["compute", "bfloat16", "int8", "int6"]  # compute: the dtype of activations

_LARGEST = {"int8": 127, "int6": 31}  # largest value of each format
_STORED = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "int6": jnp.uint8}


def is_quantized(form: Format) -> bool:
    """Whether rows of this format have scales."""
    return form in _LARGEST


def stored(form: Format, compute: jnp.dtype) -> jnp.dtype:
    """The dtype of the cache's arrays, given that of the activations."""
    return jnp.dtype(_STORED.get(form, compute))


def quantize(x: Array, form: Format) -> tuple[Array, Array]:
    """Rows [..., W] as stored rows (int8 [..., W] or uint8 [..., 3 W / 4]) and float16 scales [...]."""
    largest = _LARGEST[form]
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, 2.0**-14)
    rounded = scale.astype(jnp.float16)
    up = jnp.nextafter(rounded, jnp.float16(jnp.inf))
    scale = jnp.where(rounded.astype(jnp.float32) < scale, up, rounded)
    integers = jnp.round(x / scale.astype(jnp.float32)[..., None]).astype(jnp.int32)
    return (integers.astype(jnp.int8) if form == "int8" else packing.pack(integers)), scale
