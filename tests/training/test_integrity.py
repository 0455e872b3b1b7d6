"""Checksums do not depend on layout or slicing, and any change of any element changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv2_jax.training import integrity

MASK = 2**32 - 1


def by_hand(array):
    """The definition in Python's own integers: MurmurHash3's last mix, of the bits and the index."""

    def mix(h):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ h >> shift) * factor) & MASK
        return h ^ h >> 16

    bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}").tolist()
    return sum(mix(b ^ mix((i + 0x9E3779B9) & MASK)) for i, b in enumerate(bits)) & MASK


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "int8"])
def test_every_layout_gives_the_sum_by_hand(dtype):
    values = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 6)) * 50, dtype))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    expected = {"x.w_D": by_hand(values)}
    assert integrity.sums({"x": {"w_D": jnp.asarray(values)}}) == expected
    for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, ("b", "a")), PartitionSpec("b", "a")):
        assert integrity.sums({"x": {"w_D": jax.device_put(values, NamedSharding(mesh, spec))}}) == expected
    indices = (
        [(i, j) for i in range(4) for j in range(8)],
        [(slice(i, i + 2), slice(j, j + 4)) for i in (0, 2) for j in (0, 4)],
        [(slice(None), slice(None), slice(k, k + 3)) for k in (0, 3)],
        [(i, slice(None), slice(k, k + 2)) for i in range(4) for k in (0, 2, 4)],
    )
    for cut in indices:
        slices = [integrity.sum_of_slice(values[at], values.shape, integrity.ranges_of(values.shape, at)) for at in cut]
        assert sum(slices) & MASK == expected["x.w_D"]


def test_slices_larger_than_a_block_give_the_sum_of_the_whole():
    values = np.random.default_rng(2).normal(size=(3, 300, 400)).astype(np.float32)
    whole = integrity.sum_of_slice(values, values.shape)
    for cut in (
        [(slice(None), slice(None), slice(k, k + 200)) for k in (0, 200)],
        [(slice(None), slice(j, j + 150)) for j in (0, 150)],
        [
            (slice(i, i + 1), slice(j, j + 100), slice(k, k + 100))
            for i in range(3)
            for j in range(0, 300, 100)
            for k in range(0, 400, 100)
        ],
    ):
        parts = [integrity.sum_of_slice(values[at], values.shape, integrity.ranges_of(values.shape, at)) for at in cut]
        assert sum(parts) & MASK == whole


def test_every_bit_counts_and_so_does_the_place():
    values = np.random.default_rng(1).normal(size=(3, 40_000)).astype(np.float32)  # more than one block
    before = integrity.sum_of_slice(values, values.shape)
    for bit in range(32):
        for at in (0, 70_001):
            changed = values.copy()
            changed.reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
            assert integrity.sum_of_slice(changed, values.shape) != before
    for changed in (values[::-1], -values, np.roll(values, 1), np.zeros_like(values)):
        assert integrity.sum_of_slice(changed, values.shape) != before


def test_numbers_that_are_not_finite_are_named():
    good = {"moe": {"w_D": jnp.ones(8), "scale_D": jnp.ones(8, jnp.bfloat16), "codes_D": jnp.ones(8, jnp.int8)}}
    integrity.check_finite(good, "here")
    mesh = Mesh(np.array(jax.devices()), ("a",))
    for bad in (jnp.nan, jnp.inf):
        for place in (jax.devices()[0], NamedSharding(mesh, PartitionSpec("a"))):
            for name in ("w_D", "scale_D"):
                leaf = jax.device_put(good["moe"][name].at[3].set(bad), place)
                with pytest.raises(
                    ValueError, match=rf"1 of the 2 parameters in here hold NaN or infinity: moe.{name}"
                ):
                    integrity.check_finite({"moe": good["moe"] | {name: leaf}}, "here")
