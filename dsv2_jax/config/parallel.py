"""The mesh of devices and the processes of a run."""

import dataclasses
import math
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices each axis of the mesh has; -1, for one of them, is the rest of the devices.

    Sequences of a batch are split over data, fsdp and expert, their positions over context, and layers over pipeline.
    Whatever the sizes, the same numbers are computed. `parallel/sharding.py` says how every array is split.
    """

    data: int = 1  # replicas of the model; they may be slices joined by a slow network
    pipeline: int = 1  # stages of MoE layers
    fsdp: int = -1  # parameters and optimizer state in shards, gathered layer by layer
    expert: int = 1  # routed experts stay where they are, and tokens travel to them
    context: int = 1  # parts of a sequence; only its latent travels
    tensor: int = 1  # heads and FFN width
    shard: Literal["parameters", "optimizer"] = "parameters"  # optimizer: ZeRO-1, parameters stay whole on each device
    slices: int = 1  # of a multi-slice TPU: the data axis, or else the pipeline axis, runs across them

    def __post_init__(self) -> None:
        sizes = self.sizes()
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        check(not bad, f"mesh.{', mesh.'.join(bad)} must be positive, or -1 for the rest of the devices")
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) <= 1, f"mesh: only one axis can be the rest of the devices (-1), not {' and '.join(rest)}")
        check(self.slices > 0, f"mesh.slices must be positive, not {self.slices}")

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, outermost first: the last ones lie closest on the torus."""
        return {name: getattr(self, name) for name in AXES}

    def size(self, *axes: str) -> int:
        """Devices along these axes together. Raises KeyError for an axis that does not exist."""
        sizes = self.sizes()
        return math.prod(sizes[axis] for axis in axes)

    def resolve(self, devices: int) -> "Mesh":
        """The mesh of so many devices, without -1. Raises ValueError if they do not fit."""
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        check(
            devices % fixed == 0 if -1 in sizes.values() else devices == fixed,
            f"mesh: {told or 'all axes 1'} cannot be laid over {devices} device{'s' * (devices > 1)}",
        )
        rest = {name: devices // fixed for name, size in sizes.items() if size == -1}
        return dataclasses.replace(self, **rest)


AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")
SINGLE = Mesh(fsdp=1)  # one device: no collectives at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which processes make up the run. On TPU hosts that list their peers nothing need be said."""

    coordinator: str = ""  # HOST:PORT of the first process; auto: ask the cluster (Cloud TPU, GKE, Slurm, MPI)
    count: int = 1  # processes in all; with HOST:PORT
    index: int = 0  # which of them this one is; with HOST:PORT

    def __post_init__(self) -> None:
        check(0 <= self.index < self.count, f"processes.index ({self.index}) must lie in 0 to {self.count - 1}")
        check(
            bool(self.coordinator) or self.count == 1,
            "processes.count needs processes.coordinator, the HOST:PORT of the first process",
        )
