"""Where the mesh puts devices that are only described: slices apart, expert groups on compact blocks of the torus."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from configs import layouts
from dsv2_jax.config import AXES, Mesh
from dsv2_jax.parallel import mesh

ROOT = Path(__file__).parent.parent.parent
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a TPU device that a mesh reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def described(topology: str, slices: int) -> list[Device]:
    """The devices of `slices` slices."""
    chip, sizes = topology.split(":")
    extents = [*map(int, sizes.split("x")), 1][:3]
    places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(extents)))]
    numbered = enumerate(itertools.product(range(slices), places))
    return [Device(id, place, index, KINDS[chip]) for id, (index, place) in numbered]


def check_layout(wanted: Mesh, topology: str) -> None:
    """Each device once; only data crosses slices; groups of 8 or more experts and of tensor parts are boxes."""
    made = mesh.make(wanted, described(topology, wanted.slices))
    assert made is not None
    assert made.axis_names == AXES
    assert len(set(made.devices.flat)) == made.devices.size == len(described(topology, wanted.slices))
    index = np.vectorize(lambda device: device.slice_index)(made.devices)
    crossed = [axis for at, axis in enumerate(AXES) if (index != index.take([0], axis=at)).any()]
    assert crossed == (["data"] if wanted.slices > 1 else [])
    assert (np.unique(index, return_counts=True)[1] == index.size / wanted.slices).all()
    shape = dict(made.shape)
    if shape["expert"] >= 8 and shape["context"] == 1:
        for name in ("expert", "tensor"):
            for group in groups(made, name):
                sides = np.ptp([device.coords for device in group], axis=0) + 1
                assert sides.prod() == len(group), (name, group)
                assert max(sides) < 8 or len(group) > 8  # a ring of 8 takes an all-to-all twice as long as a box


def groups(made, name: str) -> list[list[Device]]:
    """The devices along an axis, for every place on the others."""
    return np.moveaxis(made.devices, AXES.index(name), -1).reshape(-1, made.shape[name]).tolist()


def test_slices_of_the_documented_size_are_laid_out():
    check_layout(Mesh(slices=2, data=2, tensor=2, expert=8), "v5p:4x8x8")
    check_layout(Mesh(slices=2, data=4), "v5p:4x4x4")
    check_layout(Mesh(slices=4, data=4, expert=8), "v6e:16x16")


def test_every_slice_is_laid_out_as_a_single_one():
    one = mesh.make(Mesh(tensor=2, expert=8), described("v5p:4x8x8", 1))
    two = mesh.make(Mesh(slices=2, data=2, tensor=2, expert=8), described("v5p:4x8x8", 2))
    places = np.vectorize(lambda device: device.coords, otypes=[object])
    for index in range(2):
        half = two.devices.take([index], AXES.index("data"))
        assert (places(half) == places(one.devices)).all()
        assert {device.slice_index for device in half.flat} == {index}


def test_pipeline_stages_run_across_slices_where_replicas_cannot():
    made = mesh.make(Mesh(slices=2, pipeline=4), described("v5p:2x2x4", 2))
    index = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert (index == np.array([0, 0, 1, 1]).reshape(1, 4, 1, 1, 1, 1)).all()


@pytest.mark.parametrize(("name", "topology"), [*layouts.LAYOUTS, *layouts.SERVING])
def test_layouts(name, topology):
    for table in (layouts.LAYOUTS, layouts.SERVING):
        if (name, topology) in table:
            check_layout(table[name, topology].mesh, topology)


# Every mesh of the documentation's commands, and the topologies that the documentation names with it.
DOCUMENTED = {
    "--mesh.expert 4": ["v5e:2x4"],
    "--mesh.fsdp 4 --mesh.expert 2": ["v5e:2x4", "v6e:2x4"],
    "--mesh.fsdp -1": ["v5e:2x4", "v6e:2x4", "v5p:4x8x8"],
    "--mesh.expert 8": ["v5p:4x8x8"],
    "--mesh.fsdp -1 --mesh.expert 8": ["v5p:4x8x8", "v5p:8x8x8"],
    "--mesh.slices 2 --mesh.data 2 --mesh.tensor 2": ["v5p:4x8x8"],
    "--mesh.fsdp -1 --mesh.expert 8 --mesh.slices 2 --mesh.data 2 --mesh.tensor 2": ["v5p:4x8x8"],
    "--mesh.fsdp 1 --mesh.expert 8 --mesh.context 16": ["v5p:4x4x8"],
}


def test_meshes_of_the_documentation():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    joined = re.sub(r"\\?\s+", " ", "\n".join(texts))
    shown = {found.strip() for found in re.findall(r"(?:--mesh\.(?!shard)\w+ -?\d+\s?)+", joined)}
    assert shown <= set(DOCUMENTED), "say in DOCUMENTED which topologies these are for"
    for flags, topologies in DOCUMENTED.items():
        sizes = {name: int(size) for name, size in re.findall(r"--mesh\.(\w+) (-?\d+)", flags)}
        for topology in topologies:
            check_layout(Mesh(**sizes), topology)


def test_slices_that_do_not_fit_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"mesh.slices is 1, but the devices are in 2 slices"):
        mesh.make(Mesh(), described("v5e:2x4", 2))
    with pytest.raises(ValueError, match=r"mesh.slices is 4, but the devices are in 2 slices"):
        mesh.make(Mesh(slices=4, data=4), described("v5e:2x4", 2))
    with pytest.raises(ValueError, match=r"the slices differ in size: from 4 to 8 devices"):
        mesh.make(Mesh(slices=2, data=2), described("v5e:2x4", 2)[:-4])
    with pytest.raises(ValueError, match=r"mesh.slices \(2\) must divide .*mesh.data \(1\) or mesh.pipeline \(1\)"):
        mesh.make(Mesh(slices=2), described("v5e:2x4", 2))


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


@pytest.mark.parametrize(
    ("topology", "expert", "tensor"),
    [("v5p:4x8x8", 8, 1), ("v5p:8x8x8", 8, 1), ("v6e:16x16", 8, 1), ("v6e:16x16", 16, 1), ("v5p:4x8x8", 8, 2)],
)
def test_expert_groups_are_blocks_with_the_least_loaded_links(topology, expert, tensor):
    devices = described(topology, 1)
    extents = np.max([device.coords for device in devices], axis=0) + 1
    made = mesh.make(Mesh(expert=expert, tensor=tensor), devices[::-1])
    loads = {_busiest([device.coords for device in group], extents) for group in groups(made, "expert")}
    assert len(loads) == 1
    lines = [[tuple(i if d == dim else 0 for d in range(3)) for i in range(expert)] for dim in range(3)]
    best_line = min(_busiest(line, extents) for line, extent in zip(lines, extents, strict=True) if extent >= expert)
    assert loads.pop() <= best_line / 2


def test_tensor_groups_are_neighbours():
    """Also where the two groups fill the slice."""
    made = mesh.make(Mesh(expert=8, tensor=2), described("v5p:2x2x4", 1))
    for one, other in groups(made, "tensor"):
        assert np.abs(np.subtract(one.coords, other.coords)).sum() == 1


def test_small_groups_and_contexts_are_left_to_jax():
    for wanted, topology in (Mesh(expert=4), "v5p:2x2x4"), (Mesh(expert=8, context=8), "v5p:8x8x8"):
        devices = described(topology, 1)
        assert mesh._expert_block(wanted.resolve(len(devices)).sizes(), devices) is None


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "slices"), [("v5p:4x8x8", 2), ("v6e:4x4", 1), ("v5e:2x4", 2)])
def test_devices_are_described_as_libtpu_does(topology, slices):
    from jax.experimental import topologies

    real = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    ours = described(topology, slices)
    for name in ("device_kind", "platform", "core_on_chip"):
        assert {getattr(device, name) for device in ours} == {getattr(device, name) for device in real}
    assert {(device.slice_index, device.coords) for device in ours} == {
        (getattr(device, "slice_index", 0), tuple(device.coords)) for device in real
    }
