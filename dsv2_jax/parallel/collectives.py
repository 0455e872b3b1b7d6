"""Collectives for use inside shard_map, under one convention that keeps every gradient exact.

Training minimises the sum of the values that all devices return. So if n devices hold the same number, each returns
1 / n of it. Its cotangent arrives as n parts, one on each device, and the transposes below add them up. A final sum
over the devices that hold the same parameter gives its gradient.

On CPU a sum is a gather followed by a local sum in the order of the devices. A run must give the same bits on any
number of processes, and CPU collectives within and between processes add in different orders.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.config import Mesh
from dsv2_jax.parallel.mesh import BATCH, SAME_SEQUENCES, TENSOR, TOKENS, platform

Axes = tuple[str, ...]


def index(axes: Axes, mesh: Mesh) -> Array | int:
    """This device's index along these axes together, the first one outermost."""
    present = _present(axes, mesh)
    return lax.axis_index(present) if present else 0


def add(x: Array, axes: Axes, mesh: Mesh) -> Array:
    """The sum of x over the devices of these axes, on each of them. Its transpose is the same sum of cotangents."""
    present = _present(axes, mesh)
    if not present:
        return x
    return _add(present, x) if jnp.issubdtype(x.dtype, jnp.inexact) else _sum(present, x)


def gather(x: Array, axes: Axes, dim: int, mesh: Mesh) -> Array:
    """The shards of x, concatenated along `dim` in the order of the devices. Its transpose is `scatter`."""
    present = _present(axes, mesh)
    return _gather(present, dim, x) if present else x


def scatter(x: Array, axes: Axes, dim: int, mesh: Mesh) -> Array:
    """This device's shard, along `dim`, of the sum of x over these axes. Its transpose is `gather`."""
    present = _present(axes, mesh)
    return _scatter(present, dim, x) if present else x


def all_to_all(x: Array, axes: Axes, split: int, concat: int, mesh: Mesh) -> Array:
    """Cuts x along `split`, sends each device its part, and concatenates the received parts along `concat`."""
    present = _present(axes, mesh)
    return lax.all_to_all(x, present, split, concat, tiled=True) if present else x


def mean_over_sequences(x_B: Array, counted_B: Array, mesh: Mesh, scale: float = 1.0) -> Array:
    """This device's part of scale times the mean of x over the counted sequences of all devices.

    x and counted (bool) are the same on the devices of the context and tensor axes. The parts add up over the mesh.
    """
    weight_B = counted_B.astype(jnp.float32)
    sequences = jnp.maximum(add(weight_B.sum(), BATCH, mesh), 1)
    return scale * (x_B * weight_B).sum() / (sequences * mesh.size(*SAME_SEQUENCES))


def fraction_of_tokens(count: Array, total: Array, mesh: Mesh) -> Array:
    """This device's part of count / total, both counted over its own tokens and summed over all devices.

    Devices of the tensor axis count the same tokens. The parts add up over the mesh.
    """
    return count / (jnp.maximum(add(total, TOKENS, mesh), 1) * mesh.size(*TENSOR))


def _present(axes: Axes, mesh: Mesh) -> Axes:
    return tuple(axis for axis in axes if mesh.size(axis) > 1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _sum(axes: Axes, x: Array) -> Array:
    if platform() == "cpu":
        return jnp.sum(_wide(lax.all_gather(x, axes)), axis=0, dtype=_wide(x).dtype).astype(x.dtype)
    return lax.psum(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(axes: Axes, x: Array) -> Array:
    return _sum(axes, x)


_add.defvjp(lambda axes, x: (_sum(axes, x), None), lambda axes, _, g: (_sum(axes, g),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes: Axes, dim: int, x: Array) -> Array:
    return lax.all_gather(x, axes, axis=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scatter(axes: Axes, dim: int, x: Array) -> Array:
    if platform() != "cpu":
        return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    devices = lax.axis_size(axes)
    parts = x.reshape(*x.shape[:dim], devices, x.shape[dim] // devices, *x.shape[dim + 1 :])
    received = lax.all_to_all(jnp.moveaxis(parts, dim, 0), axes, 0, 0, tiled=True)
    return jnp.sum(_wide(received), axis=0).astype(x.dtype)


_gather.defvjp(lambda axes, dim, x: (_gather(axes, dim, x), None), lambda axes, dim, _, g: (_scatter(axes, dim, g),))
_scatter.defvjp(lambda axes, dim, x: (_scatter(axes, dim, x), None), lambda axes, dim, _, g: (_gather(axes, dim, g),))
