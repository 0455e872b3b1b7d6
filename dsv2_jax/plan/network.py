"""Collectives: which one an instruction starts, and how long it takes on the links of a torus.

A cut divides the chips into two sides, joined by a number of links. Every algorithm has to send some bytes across it:

- An all-gather sends every shard of one side, once per group with members on both sides.
- A reduce-scatter sends a partial sum for every shard of the other side.
- An all-to-all sends the data that members of one side hold for the other.
- An all-reduce counts as a reduce-scatter and an all-gather.

The estimate is the largest ratio of bytes to bandwidth over these cuts: around each chip, at each plane (on a ring,
each pair of planes) and between slices, with all groups of the collective active at once. The latency of the longest
path is added. No algorithm is faster, and good ones come close.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from dsv2_jax.plan.hlo import COLLECTIVES, Computation, HloInstruction, Module, size
from pallas_kernels.chips import Chip

AXES = ("slice", "x", "y", "z", "core")
_HOP = 1e-6  # seconds of latency per link
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation. bytes: the operand of one device, which for an all-gather is its shard."""

    kind: str
    groups: Groups  # device numbers in the program; (source, target) pairs of a permute
    bytes: int

    @property
    def wire(self) -> float:
        """Bytes that each device sends: over a ring for gathers and reductions, directly for all others."""
        n = 2 if self.kind in ("collective-permute", "collective-broadcast") else len(self.groups[0])
        match self.kind:
            case "all-gather":
                return self.bytes * (n - 1)
            case "all-reduce":
                return 2 * self.bytes * (n - 1) / n
            case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
                return self.bytes * (n - 1) / n
            case _:
                return self.bytes


@dataclasses.dataclass(frozen=True)
class Torus:
    """Positions of the devices. coords: (slice, x, y, z, core) of each device, in the program's order."""

    chip: Chip
    coords: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """The coordinates as int [devices, axes]."""
        return np.array(self.coords)

    @functools.cached_property
    def across_slices(self) -> Groups:
        """Groups of the devices that have the same position in their slices."""
        found: dict[tuple[int, ...], list[int]] = {}
        for number, (_, *there) in enumerate(self.coords):
            found.setdefault(tuple(there), []).append(number)
        return tuple(tuple(numbers) for numbers in found.values())

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(int(n) for n in self.positions.max(axis=0) + 1)

    @functools.cached_property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis wraps around to a ring.

        On a 3D torus all do if every dimension is a multiple of 4; on a 2D torus a dimension of 16 chips does.
        """
        x, y, z = self.shape[1:4]
        cube = all(n % 4 == 0 for n in (x, y, z))
        closed = (cube, cube, cube) if self.chip.links == 6 else (x == 16, y == 16, False)
        return (False, *closed, False)

    def axes(self, collective: Collective) -> tuple[str, ...]:
        """The axes whose links the collective uses: those along which the members of a group differ."""
        members = self.positions[np.array(collective.groups[0])]
        return tuple(AXES[i] for i in range(len(AXES)) if len(set(members[:, i])) > 1)

    def seconds(self, collective: Collective) -> float:
        """Seconds of the collective with all its groups active and nothing else on the links."""
        return _seconds(self, collective)

    def _capacity(self, axis: int) -> float:
        """Bytes per second across one plane perpendicular to `axis`, one way."""
        devices = len(self.coords) // self.shape[axis]
        if AXES[axis] == "slice":
            return devices * self.chip.dcn / self._cores
        if AXES[axis] == "core":
            return devices * self.chip.links * self.chip.link  # through memory: assumed as fast as all the links
        return devices / self._cores * self.chip.link

    @property
    def _cores(self) -> int:
        return self.shape[4]

    def cuts(self, axes: Sequence[str]) -> list[tuple[np.ndarray, float]]:
        """The cuts along `axes`: (bool [devices] marking one side, bytes per second across the cut, one way)."""
        found = []
        for axis in (AXES.index(name) for name in axes):
            n, at = self.shape[axis], self.positions[:, axis]
            for start in range(n if self.rings[axis] else 1):
                for length in range(1, n):
                    side = (at - start) % n < length
                    found.append((side, self._capacity(axis) * (2 if self.rings[axis] else 1)))
        chips = {tuple(coords[:4]): None for coords in self.coords}
        for chip in chips:
            side = (self.positions[:, :4] == np.array(chip)).all(axis=1)
            links = 0
            for axis in (AXES.index(name) for name in axes if name in ("x", "y", "z")):
                ring, last = self.rings[axis], self.shape[axis] - 1
                links += 2 if ring or 0 < chip[axis] < last else 1
            if links and "slice" not in axes:
                found.append((side, links * self.chip.link))
        return found


@functools.lru_cache(maxsize=4096)
def _seconds(torus: Torus, collective: Collective) -> float:
    groups = np.array(collective.groups)
    axes = torus.axes(collective) if collective.kind != "collective-permute" else _permuted(torus, groups)
    if not axes:
        return 0.0
    member = np.zeros((len(groups), len(torus.coords)), bool)
    np.put_along_axis(member, groups, True, axis=1)
    cuts = torus.cuts(axes)
    sides = np.array([side for side, _ in cuts])
    capacity = np.array([capacity for _, capacity in cuts])
    here = sides.astype(float) @ member.T.astype(float)  # [cuts, groups]: members on the marked side
    n = groups.shape[1]  # members of a group
    there = n - here
    both = (here > 0) & (there > 0)
    operand = collective.bytes
    match collective.kind:
        case "all-gather":
            crossing = np.where(both, np.maximum(here, there), 0) * operand
        case "reduce-scatter":
            crossing = np.where(both, np.maximum(here, there), 0) * operand / n
        case "all-reduce":
            crossing = 2 * np.where(both, np.maximum(here, there), 0) * operand / n
        case "all-to-all" | "ragged-all-to-all":
            crossing = here * there * operand / n
        case "collective-permute":
            leaves = sides[:, groups[:, 0]] & ~sides[:, groups[:, 1]]
            enters = ~sides[:, groups[:, 0]] & sides[:, groups[:, 1]]
            crossing = np.maximum(leaves.sum(axis=1), enters.sum(axis=1))[:, None] * operand
        case _:
            crossing = both * operand
    hops = sum(
        torus.shape[i] // 2 if torus.rings[i] else torus.shape[i] - 1 for i in (AXES.index(name) for name in axes)
    )
    return float((crossing.sum(axis=1) / capacity).max()) + hops * _HOP


def _permuted(torus: Torus, pairs: np.ndarray) -> tuple[str, ...]:
    moved = (torus.positions[pairs[:, 0]] != torus.positions[pairs[:, 1]]).any(axis=0)
    return tuple(name for name, moves in zip(AXES, moved, strict=True) if moves)


def coordinates(device: object) -> tuple[int, int, int, int, int]:
    """The (slice, x, y, z, core) of a TPU device of JAX."""
    x, y, z = getattr(device, "coords", (0, 0, 0))
    return getattr(device, "slice_index", 0), x, y, z, getattr(device, "core_on_chip", 0)


def collective_of(instruction: HloInstruction, where: Computation, module: Module, torus: Torus) -> Collective | None:
    """The collective that an instruction, fusion or asynchronous call performs or starts; None if there is none.

    An async-start without operands only prepares a collective, which its async-update starts.
    """
    transfer = instruction.attribute("_xla_megascale_transfer_type") if instruction.op == "send" else None
    if transfer:
        kind = transfer.strip('"').lower().replace("_", "-")
        sent = size(where.by_name[instruction.operands[0]].shape)
        if kind in COLLECTIVES:
            return Collective(kind, torus.across_slices, sent)
        steps = tuple(pair for group in torus.across_slices for pair in itertools.pairwise(group))
        return Collective("collective-permute", steps, sent)
    if instruction.op == "async-update" and not where.by_name[instruction.operands[0]].operands:
        instruction = where.by_name[instruction.operands[0]]
    elif instruction.op.endswith(("-done", "-update")) or (
        instruction.op == "async-start" and not instruction.operands
    ):
        return None
    kind = instruction.kind
    if kind in COLLECTIVES:
        return Collective(kind, _groups(instruction, module.devices), _operand_bytes(instruction, kind, where))
    called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
    inside = module.computations.get(called) if kind in ("async", "fusion", "call") else None
    for nested in inside.instructions if inside else ():
        found = collective_of(nested, inside, module, torus) if inside and nested.kind != "fusion" else None
        if found is not None:
            scatters = found.kind == "all-reduce" and "scatter" in called
            return dataclasses.replace(found, kind="reduce-scatter") if scatters else found
    return None


def _operand_bytes(instruction: HloInstruction, kind: str, where: Computation) -> int:
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    return sum(size(where.by_name[name].shape) for name in operands if name in where.by_name)


def _groups(instruction: HloInstruction, devices: int) -> Groups:
    """The groups of devices that communicate, by their numbers in the program."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{([^=]*?)\}\}?,", text)
    if pairs:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    if listed:
        return tuple(tuple(int(n) for n in row.split(",")) for row in re.findall(r"\{([\d,]+)\}", listed[1]))
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        return _tiled(*([int(n) for n in part.split(",")] if part else [] for part in tiled.groups()))
    return (tuple(range(devices)),)


def _tiled(shape: list[int], dims: list[int], order: list[int]) -> Groups:
    numbers = np.arange(int(np.prod(dims))).reshape(dims)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(tuple(int(n) for n in row) for row in numbers.reshape(shape))
