"""Collectives on tori whose times can be worked out by hand."""

import dataclasses
import itertools

import pytest

from dsv2_jax.plan.network import Collective, Torus
from pallas_kernels.chips import CHIPS

HOP = 1e-6
CHIP = dataclasses.replace(CHIPS["v5p"], link=1e9, dcn=1e8)
FLAT = dataclasses.replace(CHIPS["v5e"], link=1e9)
MB = 10**6


def torus(x, y=1, z=1, chip=CHIP, slices=1, cores=1):
    places = itertools.product(range(slices), range(x), range(y), range(z), range(cores))
    return Torus(chip, tuple(places))


RING = torus(16, chip=FLAT)  # one row of a 16 x 16 slice: it closes
LINE = torus(8)  # 8 x 1 x 1 does not
ALL = tuple(range(16))


@pytest.mark.parametrize(
    ("kind", "seconds", "wire"),
    [
        ("all-gather", 15 / 2, 15),  # fifteen shards come over two links
        ("reduce-scatter", 15 / 2 / 16, 15 / 16),
        ("all-reduce", 15 / 16, 30 / 16),
        # Half of the ring has 8 x 8 parts of a sixteenth for the other half, over two links.
        ("all-to-all", 64 / 16 / 2, 15 / 16),
    ],
)
def test_on_a_ring(kind, seconds, wire):
    one = Collective(kind, (ALL,), 1000 * MB)
    assert RING.seconds(one) == pytest.approx(seconds + 8 * HOP)
    assert one.wire == pytest.approx(wire * 1000 * MB)


def test_on_a_line_the_chip_at_the_end_has_one_link():
    assert LINE.seconds(Collective("all-gather", (tuple(range(8)),), 1000 * MB)) == pytest.approx(7 + 7 * HOP)


def test_shifting_by_one():
    ring = Collective("collective-permute", tuple((i, (i + 1) % 16) for i in range(16)), 1000 * MB)
    assert RING.seconds(ring) == pytest.approx(1 / 2 + 8 * HOP)  # two borders of an arc, one of them crossed outwards
    line = Collective("collective-permute", tuple((i, i + 1) for i in range(7)), 1000 * MB)
    assert LINE.seconds(line) == pytest.approx(1 + 7 * HOP)


def test_groups_that_share_links_share_their_bandwidth():
    """Every second chip of a line gathers, two groups side by side: between two chips 4 shards of each want to pass."""
    apart = ((0, 1, 2, 3), (4, 5, 6, 7))
    woven = ((0, 2, 4, 6), (1, 3, 5, 7))
    assert LINE.seconds(Collective("all-gather", apart, 1000 * MB)) == pytest.approx(3 + 7 * HOP)
    # Behind the 7th chip all but one shard of its group, and all but none of the other's: 3 + 3 over one link.
    assert LINE.seconds(Collective("all-gather", woven, 1000 * MB)) == pytest.approx(6 + 7 * HOP)


def test_a_cube_closes_in_all_dimensions_and_a_smaller_slice_in_none():
    assert torus(4, 4, 4).rings == (False, True, True, True, False)
    assert torus(2, 2, 4).rings == (False,) * 5
    cube = Collective("all-gather", (tuple(range(64)),), 1000 * MB)
    assert torus(4, 4, 4).seconds(cube) == pytest.approx(63 / 6 + 6 * HOP)
    # The corner of 2 x 2 x 4 has three links.
    assert torus(2, 2, 4).seconds(Collective("all-gather", (ALL,), 1000 * MB)) == pytest.approx(15 / 3 + 5 * HOP)


def test_between_slices_the_data_centre_is_the_bottleneck():
    two = torus(2, 2, slices=2)
    pairs = tuple((i, i + 4) for i in range(4))
    # Four chips of a slice send half an operand each, over four times the network's share of a chip.
    assert two.seconds(Collective("reduce-scatter", pairs, 1000 * MB)) == pytest.approx(1 / 2 / 0.1 + HOP)


def test_axes_of_a_collective():
    two = torus(2, 2, 4)
    assert two.axes(Collective("all-gather", ((0, 1, 2, 3),), 1)) == ("z",)
    assert two.axes(Collective("all-gather", ((0, 4, 8, 12),), 1)) == ("x", "y")
    assert two.seconds(Collective("all-gather", ((0,), (1,)), 1)) == 0
