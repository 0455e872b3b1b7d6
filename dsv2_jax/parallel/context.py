"""Context parallelism: the positions of a sequence spread over devices, of which only the latent travels.

A sequence is cut into twice as many chunks as there are devices. Device i holds chunks i and 2n - 1 - i: under a causal
mask every device then has the same work. Queries stay; what keys and values are made of, 576 numbers a token with MLA,
is gathered and brought into the order of the text.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax.config import Mesh
from dsv2_jax.parallel import collectives

AXIS = ("context",)


def order(length: int, devices: int) -> np.ndarray:
    """Which position of the text stands at each place of an array that is split over `devices`: int [length]."""
    if devices == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * devices, -1)
    return chunks[[chunk for i in range(devices) for chunk in (i, 2 * devices - 1 - i)]].reshape(-1)


def whole(x_BT: Array, mesh: Mesh) -> Array:
    """This device's part of [B, T, ...] and all others', in the order of the text: [B, S, ...]."""
    if mesh.context == 1:
        return x_BT
    gathered = collectives.gather(x_BT, AXIS, 1, mesh)
    chunks = jnp.split(gathered, 2 * mesh.context, axis=1)
    return jnp.concatenate([*chunks[0::2], *chunks[1::2][::-1]], axis=1)


def part(x_BS: Array, mesh: Mesh) -> Array:
    """The inverse of `whole`: this device's two chunks of [B, S, ...], [B, T, ...]."""
    if mesh.context == 1:
        return x_BS
    chunks = jnp.stack(jnp.split(x_BS, 2 * mesh.context, axis=1))
    first, last = places(mesh)
    return jnp.concatenate([chunks[first], chunks[last]], axis=1)


def places(mesh: Mesh) -> tuple[Array | int, Array | int]:
    """Which chunks this device holds, int32."""
    i = collectives.index(AXIS, mesh)
    return i, 2 * mesh.context - 1 - i
