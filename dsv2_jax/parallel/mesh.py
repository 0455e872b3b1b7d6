"""The device mesh: which device stands where, and what a program that is being traced may ask about it."""

import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from dsv2_jax import config
from dsv2_jax.config import AXES, check

BATCH = ("data", "fsdp", "expert")  # a batch's sequences are split over these, in this order


def make(wanted: config.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh of these devices (all of them by default), the last axes closest on the torus.

    With several slices the data axis, or else the pipeline axis, runs across them: nothing else crosses the slow
    network. None for a single device, which needs none. Raises ValueError if the sizes do not fit the devices or their
    slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = wanted.resolve(len(devices)).sizes()
    if len(devices) == 1:
        return None
    if wanted.slices > 1:
        across = next((axis for axis in ("data", "pipeline") if shape[axis] % wanted.slices == 0), "")
        check(
            bool(across),
            f"mesh.slices ({wanted.slices}) must divide mesh.data ({shape['data']}) or mesh.pipeline "
            f"({shape['pipeline']}): only these may run across slices",
        )
        inside = {**shape, across: shape[across] // wanted.slices}
        outside = {axis: wanted.slices if axis == across else 1 for axis in AXES}
        array = mesh_utils.create_hybrid_device_mesh(
            tuple(inside.values()),
            tuple(outside.values()),
            devices,
            process_is_granule=not hasattr(devices[0], "slice_index"),
        )
    elif devices[0].platform == "cpu":
        array = np.array(devices).reshape(tuple(shape.values()))
    elif (block := _expert_block(shape, devices)) is not None:
        array = block
    else:
        array = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES)


def _expert_block(shape: dict[str, int], devices: list[Any]) -> np.ndarray | None:
    """The devices with each expert group on a compact block of the torus; None where a group is small, or not alone.

    All of a group send to all others. Along one ring of 8 chips that takes twice as long as on a block of 4 x 2. The
    axes that run inside of the expert axis must be 1; those outside run over what the blocks leave.
    """
    if shape["expert"] < 8 or shape["context"] * shape["tensor"] > 1:
        return None
    places = np.array([device.coords for device in devices])
    places -= places.min(axis=0)
    extents = places.max(axis=0) + 1
    if math.prod(extents) != len(devices):  # several cores a chip, or no box
        return None

    def cost(block: tuple[int, ...]) -> tuple[float, int]:
        """Load of the busiest link, and dimensions cut: one that is whole closes to a ring and has twice the links."""
        whole = [n == extent for n, extent in zip(block, extents, strict=True)]
        loads = [n / (1 + (own and n > 2)) for n, own in zip(block, whole, strict=True) if n > 1]
        return max(loads), whole.count(False)

    divisors = ([n for n in range(1, extent + 1) if extent % n == 0] for extent in extents)
    blocks = [block for block in itertools.product(*divisors) if math.prod(block) == shape["expert"]]
    if not blocks:
        return None
    block = min(blocks, key=cost)
    grid = np.empty(extents, object)
    grid[tuple(places.T)] = devices
    apart = grid.reshape([n for extent, own in zip(extents, block, strict=True) for n in (extent // own, own)])
    dims = range(0, 2 * len(block), 2)
    return apart.transpose(*dims, *(d + 1 for d in dims)).reshape(tuple(shape.values()))


def sizes(mesh: jax.sharding.Mesh | None) -> config.Mesh:
    """The sizes of a mesh's axes; of none, those of a single device."""
    return config.Mesh(**mesh.shape) if mesh else config.SINGLE


def platform() -> str:
    """`cpu` or `tpu`: what the program being traced will run on; of devices that are only described, too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
