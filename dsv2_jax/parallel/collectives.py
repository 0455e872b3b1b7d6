"""Collectives for use inside shard_map, under one convention that keeps every gradient exact.

What is minimised is the sum, over all devices, of the values that each of them returns. So a number that n devices
hold alike is returned as an n-th by each, and its cotangent is n parts, one on each, which the transposes below add up
where they meet. A parameter that devices hold alike gets its gradient by one last sum over them.

On CPU a sum is a gather and a local sum in the order of the devices: in-process and network transports add in
different orders, and a run must give the same bits on any number of processes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.config import Mesh
from dsv2_jax.parallel.mesh import platform

Axes = tuple[str, ...]


def index(axes: Axes, mesh: Mesh) -> Array | int:
    """This device's place along these axes together, the first one outermost."""
    present = _present(axes, mesh)
    return lax.axis_index(present) if present else 0


def add(x: Array, axes: Axes, mesh: Mesh) -> Array:
    """The sum of x over the devices of these axes, on each of them; its transpose is the same sum of cotangents."""
    present = _present(axes, mesh)
    if not present:
        return x
    return _add(present, x) if jnp.issubdtype(x.dtype, jnp.inexact) else _sum(present, x)


def gather(x: Array, axes: Axes, dim: int, mesh: Mesh) -> Array:
    """The shards of x along `dim`, joined in the order of the devices; transposed, a `scatter`."""
    present = _present(axes, mesh)
    return _gather(present, dim, x) if present else x


def scatter(x: Array, axes: Axes, dim: int, mesh: Mesh) -> Array:
    """This device's shard, along `dim`, of the sum of x over these axes; transposed, a `gather`."""
    present = _present(axes, mesh)
    return _scatter(present, dim, x) if present else x


def swap(x: Array, axes: Axes, split: int, join: int, mesh: Mesh) -> Array:
    """All-to-all: cuts x along `split`, sends each device its part, and joins what arrives along `join`."""
    present = _present(axes, mesh)
    return lax.all_to_all(x, present, split, join, tiled=True) if present else x


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
