"""Checksums of arrays, which detect any change between saving and restoring, and the check for NaN and infinity.

A checksum is the sum modulo 2^32, over the elements of an array, of a hash of the element's bits and its index. So it
does not depend on how the array is laid out over devices or split into files, each device computes its own part
without reading anything from the disk, and a slice-by-slice reader adds up the sums of its slices. It is computed
from the arrays in memory, before a checkpoint is written and after it is read: it covers the copy to the host, the
compression, the network and the disk. A change of one element is always detected, any other with probability 1 - 2^-32.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import check

_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}
_BLOCK = 2**15  # elements that NumPy works on at a time: they and what it makes of them fit in a core's cache


def sums(tree: Any) -> dict[str, int]:
    """The checksum of every array of a tree on any layout, by its path (`moe.w_up_EDF`); in all processes of a run.

    Elements have at most 32 bits.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = jax.device_get([_on_host(x) if _is_on_host(x) else _on_devices(x) for _, x in leaves])
    return {_name(path): int(value) for (path, _), value in zip(leaves, found, strict=True)}


def sum_of_slice(values: np.ndarray, shape: tuple[int, ...], lead: tuple[int, ...] = ()) -> int:
    """What `values`, the part at the leading indices `lead` of an array of `shape`, adds to the array's checksum."""
    at = sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(lead))
    total = 0
    for part in _blocks(values):
        index = np.arange(part.size, dtype=np.uint32) + np.uint32(at % 2**32)
        bits = part.view(_UNSIGNED[part.dtype.itemsize]).astype(np.uint32)
        total += int(_hash(bits, index).sum(dtype=np.uint32))
        at += part.size
    return total % 2**32


def of_json(value: Any) -> str:
    """The digest of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_finite(params: Any, where: str) -> None:
    """Raises ValueError naming arrays of a tree of parameters, quantised or not, that hold NaN or infinity."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = [(path, x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1]
    finite = jax.device_get([_finite_on_host(x) if _is_on_host(x) else _finite(x) for _, x in leaves])
    bad = [_name(path) for (path, _), fine in zip(leaves, finite, strict=True) if not fine]
    check(not bad, f"{len(bad)} of the {len(leaves)} parameters in {where} hold NaN or infinity: {', '.join(bad[:3])}")


def _is_on_host(leaf: jax.Array) -> bool:
    """Whether NumPy can read the array in place: then there is nothing to compile."""
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _view(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf.addressable_shards[0].data)  # of the array itself JAX would keep the view, and the buffer


def _on_host(leaf: jax.Array) -> np.uint32:
    return np.uint32(sum_of_slice(_view(leaf), leaf.shape))


@jax.jit
def _on_devices(leaf: jax.Array) -> jax.Array:
    """uint32 []. Indices wrap at 2^32 elements."""
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = np.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * stride
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    return jnp.sum(_hash(bits, index), dtype=jnp.uint32)


def _finite_on_host(leaf: jax.Array) -> np.bool:
    return np.bool(all(np.isfinite(part).all() for part in _blocks(_view(leaf))))


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _hash(bits: Any, index: Any) -> Any:
    """uint32 arrays of NumPy or JAX. For a given index it is a bijection of the bits."""
    return _mix(bits ^ _mix(index + np.uint32(0x9E3779B9)))


def _mix(h: Any) -> Any:
    """The bijection of 32 bits that ends MurmurHash3."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
