"""The mesh of devices and the processes of a run."""

import dataclasses
import math
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Number of devices along each mesh axis. One axis may be -1: the remaining devices.

    Sequences are split over data, fsdp and expert, positions over context, and layers over pipeline. Results do not
    depend on the mesh. `parallel/sharding.py` gives the sharding of every array.
    """

    # The axes, outermost first: the last ones are closest on the torus.
    data: int = 1  # replicas of the model; may cross slices that a slower network connects
    pipeline: int = 1  # pipeline stages of the MoE layers
    fsdp: int = -1  # shards of parameters and optimizer state, all-gathered layer by layer
    expert: int = 1  # shards of the routed experts; tokens are sent to their experts
    context: int = 1  # shards of a sequence; only the KV latent is exchanged
    tensor: int = 1  # shards of the heads and the FFN width
    shard: Literal["parameters", "optimizer"] = "parameters"  # optimizer: ZeRO-1, every device keeps all parameters
    slices: int = 1  # slices of a multi-slice TPU; the data axis, else the pipeline axis, spans them

    def __post_init__(self) -> None:
        sizes = self.sizes()
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        check(not bad, f"mesh.{', mesh.'.join(bad)} must be positive, or -1 for the remaining devices")
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) <= 1, f"mesh: only one axis can be -1, the remaining devices, not {' and '.join(rest)}")
        check(self.slices > 0, f"mesh.slices must be positive, not {self.slices}")

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, outermost first; the last axes are closest on the torus."""
        return {name: getattr(self, name) for name in AXES}

    def size(self, *axes: str) -> int:
        """Product of the devices along these axes. Raises KeyError for an unknown axis."""
        sizes = self.sizes()
        return math.prod(sizes[axis] for axis in axes)

    def resolve(self, devices: int) -> "Mesh":
        """The mesh with -1 replaced, for this number of devices. Raises ValueError if they do not fit."""
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        axes = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        check(
            devices % fixed == 0 if -1 in sizes.values() else devices == fixed,
            f"mesh: {axes or 'all axes 1'} does not fit {devices} device{'s' * (devices > 1)}",
        )
        rest = {name: devices // fixed for name, size in sizes.items() if size == -1}
        return dataclasses.replace(self, **rest)


AXES = tuple(f.name for f in dataclasses.fields(Mesh) if f.name not in ("shard", "slices"))
SINGLE = Mesh(fsdp=1)  # one device, without collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run. Needs no setting on TPU hosts that list their peers."""

    coordinator: str = ""  # HOST:PORT of the first process; auto: from Cloud TPU, GKE, Slurm or MPI
    count: int = 1  # number of processes; needed with HOST:PORT
    index: int = 0  # index of this process; needed with HOST:PORT

    def __post_init__(self) -> None:
        check(0 <= self.index < self.count, f"processes.index ({self.index}) must be from 0 to {self.count - 1}")
        check(
            bool(self.coordinator) or self.count == 1,
            "processes.count needs processes.coordinator, the HOST:PORT of the first process",
        )
