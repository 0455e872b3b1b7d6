"""The device mesh: which device stands where, and what a program that is being traced may ask about it."""

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
    else:
        array = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES)


def sizes(mesh: jax.sharding.Mesh | None) -> config.Mesh:
    """The sizes of a mesh's axes; of none, those of a single device."""
    return config.Mesh(**mesh.shape) if mesh else config.SINGLE


def platform() -> str:
    """`cpu` or `tpu`: what the program being traced will run on; of devices that are only described, too."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
