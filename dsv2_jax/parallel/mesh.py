"""The device mesh: which device stands where, and what a program that is being traced may ask about it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from dsv2_jax import config
from dsv2_jax.config import AXES, check

BATCH = ("data", "fsdp", "expert")  # a batch's sequences are split over these, in this order


def make(wanted: config.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh of these devices (all of them by default), the last axes closest on the torus.

    Every slice is laid out as a single one is. With several, the data axis, or else the pipeline axis, runs across
    them: nothing else crosses the slow network. None for a single device, which needs none. Raises ValueError if the
    sizes do not fit the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = wanted.resolve(len(devices)).sizes()
    if len(devices) == 1:
        return None
    across = next((axis for axis in ("data", "pipeline") if shape[axis] % wanted.slices == 0), "")
    check(
        bool(across),
        f"mesh.slices ({wanted.slices}) must divide mesh.data ({shape['data']}) or mesh.pipeline "
        f"({shape['pipeline']}): only these may run across slices",
    )
    inside = {**shape, across: shape[across] // wanted.slices}
    arrays = [_lay_out(inside, group) for group in _slices(devices, wanted.slices)]
    return jax.sharding.Mesh(np.concatenate(arrays, axis=AXES.index(across)), AXES)


def _slices(devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of each slice, in the order of the slices. Where devices know of none, a process is a slice."""
    known = hasattr(devices[0], "slice_index")
    if count == 1 and not (known and devices[0].platform == "tpu"):
        return [devices]
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(device.slice_index if known else device.process_index, []).append(device)
    sizes = sorted(len(group) for group in groups.values())
    check(
        len(groups) == count,
        f"mesh.slices is {count}, but the devices are in {len(groups)} {'slices' if known else 'processes'}",
    )
    check(sizes[0] == sizes[-1], f"the slices differ in size: from {sizes[0]} to {sizes[-1]} devices")
    return [groups[index] for index in sorted(groups)]


def _lay_out(shape: dict[str, int], devices: list[Any]) -> np.ndarray:
    """The devices of one slice as an array of this shape."""
    sizes = tuple(shape.values())
    if devices[0].platform == "cpu":
        return np.array(devices).reshape(sizes)
    if (block := _expert_block(shape, devices)) is not None:
        return block
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _expert_block(shape: dict[str, int], devices: list[Any]) -> np.ndarray | None:
    """The devices with each expert group on a compact block of the torus; None for groups below 8 or a context axis.

    All devices of a group send to all others. Along one ring of 8 chips that takes twice as long as on a block of
    4 x 2. A tensor group gets a block of its own, with the expert group outside of it, in other dimensions of the torus
    if possible. The axes outside of the expert axis run over the remaining places.
    """
    if shape["expert"] < 8 or shape["context"] > 1:
        return None
    places = np.array([device.coords for device in devices])
    places -= places.min(axis=0)
    extents = tuple(int(n) for n in places.max(axis=0) + 1)
    if math.prod(extents) != len(devices):  # several cores a chip, or no box
        return None

    def cost(expert: tuple[int, ...], tensor: tuple[int, ...]) -> tuple[float, float, int]:
        """Loads of the busiest links of an expert and of a tensor group, and dimensions that an expert group cuts.

        Interleaved groups share the links of a dimension. A group that fills a dimension closes to a ring and has
        twice the links.
        """
        spans = [e * t for e, t in zip(expert, tensor, strict=True)]
        loads = [n / (1 + (n == extent and n > 2)) for n, extent in zip(spans, extents, strict=True)]
        of_expert, of_tensor = (
            max((load for n, load in zip(group, loads, strict=True) if n > 1), default=0) for group in (expert, tensor)
        )
        return of_expert, of_tensor, sum(n != extent for n, extent in zip(expert, extents, strict=True))

    layouts = [
        (expert, tensor)
        for expert in _blocks(extents, shape["expert"])
        for tensor in _blocks([n // e for n, e in zip(extents, expert, strict=True)], shape["tensor"])
    ]
    if not layouts:
        return None
    expert, tensor = min(layouts, key=lambda pair: cost(*pair))
    grid = np.empty(extents, object)
    grid[tuple(places.T)] = devices
    parts = [(n // (e * t), e, t) for n, e, t in zip(extents, expert, tensor, strict=True)]
    dims = range(0, 3 * len(parts), 3)
    order = [d + part for part in range(3) for d in dims]  # the rest, then the expert blocks, then the tensor blocks
    return grid.reshape([n for part in parts for n in part]).transpose(order).reshape(tuple(shape.values()))


def _blocks(extents: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The boxes of `size` places whose sides divide the extents."""
    divisors = ([n for n in range(1, extent + 1) if extent % n == 0] for extent in extents)
    return [block for block in itertools.product(*divisors) if math.prod(block) == size]


def sizes(mesh: jax.sharding.Mesh | None) -> config.Mesh:
    """The sizes of a mesh's axes; of none, those of a single device."""
    return config.Mesh(**mesh.shape) if mesh else config.SINGLE


def platform() -> str:
    """`cpu` or `tpu`: what the program being traced will run on; of devices that are only described, too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """What the devices call themselves that the program being traced will run on: `TPU v5 lite`, for one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
