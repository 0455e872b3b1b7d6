"""Properties of each TPU that the kernels, their estimates and the planner use: one table, with its sources.

The table is not in pricing/ because the kernels read it at run time, to see whether they support the chip.

Sources:
- HBM bandwidth, VMEM, number and width of the MXUs: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2, divided by the
  cores of a chip.
- Clock: the one at which these MXUs reach the published peak: 197, 459, 918 and 2,307 TFLOP/s in bfloat16 per chip
  (cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x).
- Cycles of a matmul instruction: 16 rows of bfloat16, at the rows per cycle that the same peak implies.
- Latencies: the distance in the compiler's own schedules between a matmul, or a transpose, and the pop of its result.
- Delay slots: the bundles after a branch that have the guards of those before it. A label or another branch also ends
  them.
- HBM size and links: the same pages. A link has the chip's bidirectional bandwidth divided by its links and by two
  directions, times 0.9, the share that a large transfer reaches (jax-ml.github.io/scaling-book/tpus).
- Between slices: a chip's share of the data centre network, the same pages.
- v4: cloud.google.com/tpu/docs/v4, in the same way.
"""

import dataclasses

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TensorCore of a chip. cores: TensorCores of one JAX device; with 2 a kernel's grid may use both."""

    kind: str  # jax.Device.device_kind
    topology: str  # the smallest, for jax.experimental.topologies
    cores: int
    clock: float  # Hz
    mxus: int
    mxu_width: int
    matmul_cycles: int  # cycles that a matmul instruction (16 rows of 16 bits, or 8 of 32) occupies an MXU
    matmul_latency: int  # cycles from its issue to its first result
    delay_slots: int = 4  # maximum number of bundles after a branch that still execute
    hbm: float  # bytes per second
    vmem: int  # bytes
    hbm_size: int  # bytes of one device
    devices: int = 1  # of a chip
    links: int  # of a chip to its neighbours: 6 in a 3D torus, 4 in a 2D torus
    link: float  # bytes per second, one way
    dcn: float  # bytes per second of a chip to other slices, one way
    published: float  # FLOP/s of one JAX device in bfloat16, as its page gives it

    @property
    def peak(self) -> float:
        """FLOP/s of one core in bfloat16."""
        return 2 * self.mxus * self.mxu_width**2 * 16 / self.matmul_cycles * self.clock


CHIPS = {
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
        published=197e12,
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
        published=459e12,
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
        published=918e12,
    ),
    "tpu7x": Chip(  # a chip is two devices with one core each
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
        published=2307e12 / 2,
    ),
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
        published=275e12,
    ),
}


# A v4's VMEM holds no block of the kernels, so a v4 runs XLA's own operations.
KERNEL_CHIPS = tuple(name for name in CHIPS if name != "v4")


def here() -> str | None:
    """Name of the chip for which JAX traces now: that of the mesh in use, else of the default device.

    None unless it is one of KERNEL_CHIPS.
    """
    if not pltpu.is_tpu_device():
        return None
    version = str(pltpu.get_tpu_info().chip_version)
    name = "tpu7x" if version == "7x" else version
    return name if name in KERNEL_CHIPS else None


def require() -> str:
    """As `here`. Raises ValueError where the kernels do not run."""
    chip = here()
    if chip is None:
        raise ValueError(f"the kernels run on TPU {', '.join(KERNEL_CHIPS)} only, and this device is none of them")
    return chip
