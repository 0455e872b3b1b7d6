"""What the kernels and their cost need to know of each TPU: one table, with its sources.

Sources. HBM and VMEM: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2, divided by the cores of a chip. MXUs and their
width: the same. Clock: the one at which these MXUs give the published peak (cloud.google.com/tpu/docs/v5e, v5p, v6e,
tpu7x: 197, 459, 918 and 2,307 TFLOP/s in bfloat16 a chip). Cycles a matmul instruction occupies its MXU: 16 rows of
bfloat16 at the rows a cycle which that same peak asks for. Latencies: read off the distance that the compiler's own
schedules keep between a matmul, or a transpose, and the pop of its result. Delay slots: the bundles behind a branch
that are guarded as those before it are; a label or another branch ends them too. HBM's size and the links: the same
pages of Google's documentation, whose bidirectional bandwidth of a chip is divided by its links and by two directions;
of that nine tenths, which is what a link carries of a large transfer (jax-ml.github.io/scaling-book/tpus). Between
slices: the data centre network's share of a chip, the same pages. v4: cloud.google.com/tpu/docs/v4, likewise.
"""

import dataclasses

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TensorCore of a chip, and how many of them one device has (`cores`: 2 where a kernel's grid may use both)."""

    kind: str  # as jax.Device.device_kind says it
    topology: str  # the smallest one, for jax.experimental.topologies
    cores: int
    clock: float  # Hz
    mxus: int
    mxu_width: int
    matmul_cycles: int  # that one matmul instruction (16 rows of 16 bits, or 8 of 32) occupies an MXU
    matmul_latency: int  # cycles from there to its first result
    delay_slots: int = 4  # bundles behind a branch that are still executed, at most
    hbm: float  # bytes a second
    vmem: int  # bytes
    hbm_size: int  # bytes of one device
    devices: int = 1  # of a chip
    links: int  # of a chip to its neighbours: 6 on a 3D torus, 4 on a 2D one
    link: float  # bytes a second, one way
    dcn: float  # bytes a second of a chip to other slices, one way

    @property
    def peak(self) -> float:
        """FLOP/s of one core in bfloat16."""
        return 2 * self.mxus * self.mxu_width**2 * 16 / self.matmul_cycles * self.clock


CHIPS = {  # that the kernels are made for
    "v5e": Chip(
        kind="TPU v5 lite",
        topology="v5e:2x2",
        cores=1,
        clock=1.5e9,
        mxus=4,
        mxu_width=128,
        matmul_cycles=16,
        matmul_latency=83,
        hbm=8.2e11,
        vmem=128 * 2**20,
        hbm_size=16 * 2**30,
        links=4,
        link=45e9,
        dcn=3.125e9,
    ),
    "v5p": Chip(
        kind="TPU v5",
        topology="v5p:2x2x1",
        cores=2,
        clock=1.75e9,
        mxus=4,
        mxu_width=128,
        matmul_cycles=16,
        matmul_latency=83,
        hbm=1.23e12,
        vmem=64 * 2**20,
        hbm_size=95 * 2**30,
        links=6,
        link=90e9,
        dcn=6.25e9,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        topology="v6e:2x2",
        cores=1,
        clock=1.75e9,
        mxus=2,
        mxu_width=256,
        matmul_cycles=8,
        matmul_latency=100,
        hbm=1.64e12,
        vmem=128 * 2**20,
        hbm_size=32 * 2**30,
        links=4,
        link=90e9,
        dcn=12.5e9,
    ),
    "tpu7x": Chip(  # a chip is two devices of one core
        kind="TPU7x",
        topology="tpu7x:2x2x1",
        cores=1,
        clock=2.2e9,
        mxus=2,
        mxu_width=256,
        matmul_cycles=8,
        matmul_latency=100,
        delay_slots=6,
        hbm=3.7e12,
        vmem=64 * 2**20,
        hbm_size=96 * 2**30,
        devices=2,
        links=6,
        link=90e9,
        dcn=12.5e9,
    ),
}

# Whole programs are planned for these; a v4's VMEM holds no block of the kernels, so it runs XLA's own operations.
PLANNED = CHIPS | {
    "v4": Chip(
        kind="TPU v4",
        topology="v4:2x2x1",
        cores=2,
        clock=1.05e9,
        mxus=4,
        mxu_width=128,
        matmul_cycles=16,
        matmul_latency=83,
        hbm=6.15e11,
        vmem=16 * 2**20,
        hbm_size=32 * 2**30,
        links=6,
        link=45e9,
        dcn=6.25e9,
    ),
}


def here() -> str | None:
    """The chip that code traced now is for, the mesh's in use, else the default device's: its name in `CHIPS`.

    None: no TPU of these.
    """
    if not pltpu.is_tpu_device():
        return None
    version = str(pltpu.get_tpu_info().chip_version)
    name = "tpu7x" if version == "7x" else version
    return name if name in CHIPS else None


def needed() -> str:
    """`here`. Raises ValueError where there is none of these chips."""
    chip = here()
    if chip is None:
        raise ValueError(f"the kernels need a TPU of {', '.join(CHIPS)}, and this is none of them")
    return chip
