"""Where the mesh puts devices that are only described: expert groups on compact blocks of the torus."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dsv2_jax.parallel import mesh


def _laid_out(extents, *, expert, **axes):
    devices = [SimpleNamespace(coords=place) for place in itertools.product(*map(range, extents))]
    shape = {"data": 1, "pipeline": 1, "fsdp": len(devices) // expert, "expert": expert, "context": 1, "tensor": 1}
    array = mesh._expert_block(shape | axes, devices[::-1])
    if array is None:
        return None
    assert len({device.coords for device in array.flat}) == len(devices)
    return np.vectorize(lambda device: device.coords, otypes=[object])(array)


def _busiest(places, extents):
    """Vectors over the busiest cut if all of these devices send one to each of the others, counted link by link."""
    found = []
    for dim, extent in enumerate(extents):
        line = sorted({place[dim] for place in places})
        across = len(places) // len(line)  # lines of this dimension, each with its own links
        links = across * (2 if len(line) == extent and extent > 2 else 1)
        low = sum(place[dim] < line[len(line) // 2] for place in places)
        found.append(low * (len(places) - low) / links)
    return max(found)


@pytest.mark.parametrize(("extents", "expert"), [((4, 8, 8), 8), ((8, 8, 8), 8), ((16, 16, 1), 8), ((16, 16, 1), 16)])
def test_expert_groups_are_blocks_with_the_least_loaded_links(extents, expert):
    array = _laid_out(extents, expert=expert)
    assert array is not None
    along = [group.tolist() for group in np.moveaxis(array, 3, -1).reshape(-1, expert)]
    loads = {_busiest(group, extents) for group in along}
    assert len(loads) == 1
    lines = [[tuple(i if d == dim else 0 for d in range(3)) for i in range(expert)] for dim in range(3)]
    best_line = min(_busiest(line, extents) for line, extent in zip(lines, extents, strict=True) if extent >= expert)
    assert loads.pop() <= best_line / 2


def test_small_groups_and_inner_axes_are_left_to_jax():
    assert _laid_out((2, 2, 4), expert=4) is None
    assert _laid_out((4, 8, 8), expert=8, fsdp=16, tensor=2) is None
