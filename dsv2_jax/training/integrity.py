"""Checksums of arrays, which detect changes between saving and restoring, and the check for NaN and infinity.

A checksum is the sum modulo 2^32, over the elements of an array, of a hash of the element's bits and index. It does not
depend on the array's layout over devices or files: each device computes its own part, and a reader of slices adds up
the sums of its slices. Checksums are computed from arrays in memory, before a checkpoint is written and after it is
read, so they cover the copy to the host, compression, network and disk. They always detect a change of one element, and
any other change with probability 1 - 2^-32.
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
_BLOCK = 2**15  # elements that NumPy processes at a time: they and the intermediate results fit in a core's cache


def sums(tree: Any) -> dict[str, int]:
    """The checksum of every array of a tree by its path (`moe.w_up_EDF`), for any layout.

    Elements have at most 32 bits. All processes of a run must call it.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # Waits for each sum: on CPU, concurrent programs with collectives can starve each other of threads.
    return {_name(path): int(_on_host(x) if _is_on_host(x) else _on_devices(x)) for path, x in leaves}


def ranges_of(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[range, ...]:
    """The indices of each dimension that `array[index]` selects; index holds integers and slices without a step."""
    full = (*index, *(slice(None) for _ in shape[len(index) :]))
    return tuple(
        range(*i.indices(n)) if isinstance(i, slice) else range(i, i + 1) for i, n in zip(full, shape, strict=True)
    )


def sum_of_slice(values: np.ndarray, shape: tuple[int, ...], ranges: tuple[range, ...] | None = None) -> int:
    """The part of a checksum from `values`, the elements of an array of `shape` at `ranges` (None: all)."""
    ranges = ranges or ranges_of(shape, ())
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    at = sum(r.start * stride for r, stride in zip(ranges, strides, strict=True))
    rows = max((axis for axis, (r, n) in enumerate(zip(ranges, shape, strict=True)) if len(r) != n), default=0)
    # From the last sliced dimension on, elements are contiguous.
    lengths = [len(r) for r in ranges[:rows]]
    return _sum(np.ascontiguousarray(values).reshape(*lengths, -1), at, strides[:rows]) % 2**32


def _sum(values: np.ndarray, at: int, strides: tuple[int, ...]) -> int:
    """Sum for values with a contiguous last dimension and these strides in the others; the first one has index `at`."""
    if not strides:
        parts = range(0, values.size, _BLOCK)
        return sum(_sum_block(values[i : i + _BLOCK], np.arange(len(values[i : i + _BLOCK])) + at + i) for i in parts)
    size = values[0].size
    if size >= _BLOCK:
        return sum(_sum(part, at + i * strides[0], strides[1:]) for i, part in enumerate(values))
    step, total = _BLOCK // size, 0
    for i in range(0, len(values), step):
        part = values[i : i + step]
        index = np.arange(part.shape[-1]) + at
        for axis, stride in enumerate(strides):
            offsets = (np.arange(part.shape[axis]) + (i if axis == 0 else 0)) * stride
            index = index + offsets.reshape(-1, *(1,) * (part.ndim - 1 - axis))
        total += _sum_block(part, index)
    return total


def _sum_block(values: np.ndarray, index: np.ndarray) -> int:
    bits = np.ascontiguousarray(values).view(_UNSIGNED[values.dtype.itemsize]).astype(np.uint32)
    return int(_hash(bits, index.astype(np.uint32)).sum(dtype=np.uint32))


def of_json(value: Any) -> str:
    """The hexadecimal digest of a JSON value; the order of keys does not matter."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def digest(tree: Any) -> str:
    """The hexadecimal digest of a tree's checksums: equal for any layout and in all processes."""
    return of_json(sums(tree))


def check_finite(params: Any, where: str) -> None:
    """Raises ValueError naming the arrays of a parameter tree, quantised or not, that hold NaN or infinity."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = [(path, x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1]
    bad = [_name(path) for path, x in leaves if not bool(_finite_on_host(x) if _is_on_host(x) else _finite(x))]
    check(not bad, f"{len(bad)} of the {len(leaves)} parameters in {where} hold NaN or infinity: {', '.join(bad[:3])}")


def _is_on_host(leaf: jax.Array) -> bool:
    """Whether NumPy can read the array in place, which needs no compilation."""
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _view(leaf: jax.Array) -> np.ndarray:
    return np.asarray(
        leaf.addressable_shards[0].data
    )  # JAX would cache a view of the full array and keep its buffer alive


def _on_host(leaf: jax.Array) -> int:
    return sum_of_slice(_view(leaf), leaf.shape)


@jax.jit
def _on_devices(leaf: jax.Array) -> jax.Array:
    """The checksum of a sharded array, uint32 []; indices wrap at 2^32 elements."""
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = np.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * stride
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    return jnp.sum(_hash(bits, index), dtype=jnp.uint32)


def _finite_on_host(leaf: jax.Array) -> bool:
    return all(np.isfinite(part).all() for part in _blocks(_view(leaf)))


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _hash(bits: Any, index: Any) -> Any:
    """A hash of uint32 arrays of NumPy or JAX; for a given index a bijection of the bits."""
    return _mix(bits ^ _mix(index + np.uint32(0x9E3779B9)))


def _mix(h: Any) -> Any:
    """The finalizer of MurmurHash3, a bijection of 32 bits."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
