"""Context parallelism: the positions of a sequence are spread over devices, which exchange only latents.

A sequence is cut into 2n chunks for n devices. Device i holds chunks i and 2n - 1 - i, which gives all devices equal
work under a causal mask. Queries stay on their device. The latents from which keys and values are computed, 576 numbers
per token with MLA, are all-gathered into text order.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv2_jax.config import Mesh
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.mesh import CONTEXT


def order(length: int, devices: int) -> np.ndarray:
    """The text position of each element of an array that is split over `devices`: int [length]."""
    if devices == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * devices, -1)
    return chunks[[chunk for i in range(devices) for chunk in (i, 2 * devices - 1 - i)]].reshape(-1)


def gather(x_BT: Array, mesh: Mesh) -> Array:
    """The positions of all devices in text order, [B, S, ...], given this device's [B, T, ...]."""
    if mesh.size(*CONTEXT) == 1:
        return x_BT
    gathered = collectives.gather(x_BT, CONTEXT, 1, mesh)
    parts = jnp.split(gathered, 2 * mesh.size(*CONTEXT), axis=1)
    return jnp.concatenate([*parts[0::2], *parts[1::2][::-1]], axis=1)


def local(x_BS: Array, mesh: Mesh) -> Array:
    """The inverse of `gather`: this device's two chunks of [B, S, ...], as [B, T, ...]."""
    if mesh.size(*CONTEXT) == 1:
        return x_BS
    parts = jnp.stack(jnp.split(x_BS, 2 * mesh.size(*CONTEXT), axis=1))
    first, last = chunks(mesh)
    return jnp.concatenate([parts[first], parts[last]], axis=1)


def chunks(mesh: Mesh) -> tuple[Array | int, Array | int]:
    """The numbers of this device's two chunks, int32."""
    i = collectives.index(CONTEXT, mesh)
    return i, 2 * mesh.size(*CONTEXT) - 1 - i
