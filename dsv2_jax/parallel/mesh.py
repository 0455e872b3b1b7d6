"""The device mesh: the placement of devices on it, groups of its axes, and the platform of a program being traced."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from dsv2_jax import config
from dsv2_jax.config import AXES, check

# What the axes split. Other code names these groups and no axis, so a new axis joins its groups here.
BATCH = ("data", "fsdp", "expert")  # a batch's sequences, in this order
EXPERT = ("expert",)  # routed experts
CONTEXT = ("context",)  # positions of a sequence
PIPELINE = ("pipeline",)  # MoE layers
TENSOR = ("tensor",)  # heads, vocabulary and FFN widths
TOKENS = (*BATCH, *CONTEXT)  # a batch's tokens
STORAGE = ("fsdp", "context")  # the model and latent dimensions of stored parameters
ACROSS_SLICES = ("data", "pipeline")  # the first of these that fits runs across slices
SAME_SEQUENCES = (*CONTEXT, *TENSOR)  # devices of a stage that hold the same sequences
SAME_BATCH = tuple(axis for axis in AXES if axis not in BATCH)  # devices of all stages that hold the same sequences


def make(wanted: config.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh of these devices (by default all), with the last axes closest on the torus; None for a single device.

    Each slice has the layout of a single one. The first axis of ACROSS_SLICES that fits runs across slices: nothing
    else crosses the slow network between them. Raises ValueError if the sizes do not fit the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = wanted.resolve(len(devices)).sizes()
    if len(devices) == 1:
        return None
    across = next((axis for axis in ACROSS_SLICES if shape[axis] % wanted.slices == 0), "")
    check(
        bool(across),
        f"mesh.slices ({wanted.slices}) must divide "
        f"{' or '.join(f'mesh.{axis} ({shape[axis]})' for axis in ACROSS_SLICES)}: only these may run across slices",
    )
    inside = {**shape, across: shape[across] // wanted.slices}
    arrays = [_lay_out(inside, group) for group in _slices(devices, wanted.slices)]
    return jax.sharding.Mesh(np.concatenate(arrays, axis=AXES.index(across)), AXES)


def _slices(devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of each slice, in the order of the slices. Devices without a slice index are grouped by process."""
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

    All devices of a group send to each other, which takes twice as long along a ring of 8 chips as on a block of 4 x 2.
    A tensor group gets a block of its own inside the expert group's, in other dimensions of the torus if possible. The
    axes outside the expert axis run over the remaining positions.
    """
    if shape["expert"] < 8 or shape["context"] > 1:
        return None
    places = np.array([device.coords for device in devices])
    places -= places.min(axis=0)
    extents = tuple(int(n) for n in places.max(axis=0) + 1)
    if math.prod(extents) != len(devices):  # several cores per chip, or not a box
        return None

    def cost(expert: tuple[int, ...], tensor: tuple[int, ...]) -> tuple[float, float, int]:
        """The busiest link's load for an expert and a tensor group, and how many dimensions an expert group divides.

        Interleaved groups share the links of a dimension. A group that fills a dimension is a ring and has twice as
        many links.
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
    """The boxes of `size` positions whose sides divide the extents."""
    divisors = ([n for n in range(1, extent + 1) if extent % n == 0] for extent in extents)
    return [block for block in itertools.product(*divisors) if math.prod(block) == size]


def check_axes(sizes: config.Mesh, axes: Sequence[str], what: str) -> None:
    """Raises ValueError if an axis other than `axes` has more than one device. what: what runs on these axes only."""
    others = [axis for axis in AXES if axis not in axes]
    check(
        sizes.size(*others) == 1,
        f"{what} runs on the axes {_listed([axis for axis in AXES if axis in axes])}; "
        f"{_listed([f'mesh.{axis}' for axis in others])} must be 1",
    )


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def sizes(mesh: jax.sharding.Mesh | None) -> config.Mesh:
    """The sizes of a mesh's axes; without a mesh, those of a single device."""
    return config.Mesh(**mesh.shape) if mesh else config.SINGLE


def platform() -> str:
    """The platform of the program being traced, such as `cpu` or `tpu`, also for devices that are not attached."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """The kind of the devices of the program being traced, such as `TPU v5 lite`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
