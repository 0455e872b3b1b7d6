"""How long a collective takes on the links of a torus: the bytes that must cross each cut, over the cut's bandwidth.

Any set of chips is joined to the rest by so many links, and whatever the algorithm, some bytes have to cross them: of
an all-gather every shard of one side, once for every group that reaches over; of a reduce-scatter a sum for every shard
of the other side; of an all-to-all what one side has for the other. A collective takes as long as its worst cut. Looked
at are every chip, every plane (on a ring: every pair of planes), and the border between slices, with all groups of the
collective at work at once. No algorithm is faster; good ones come close.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pallas_kernels.chips import Chip

AXES = ("slice", "x", "y", "z", "core")
_HOP = 1e-6  # seconds from a chip to the next one
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """What a collective does. bytes: that a device sends, of an all-gather its shard, else its whole operand."""

    kind: str
    groups: Groups  # devices that work together, by their number in the program; of a permute (source, target) pairs
    bytes: int

    @property
    def wire(self) -> float:
        """Bytes that leave a device over a ring, or directly: what one link would carry."""
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
    """Devices by their place. coords: (slice, x, y, z, core) of each device, in the order of the program's devices."""

    chip: Chip
    coords: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def place(self) -> np.ndarray:
        """int [devices, axes]."""
        return np.array(self.coords)

    @functools.cached_property
    def across_slices(self) -> Groups:
        """The devices that stand in the same place of their slices."""
        found: dict[tuple[int, ...], list[int]] = {}
        for number, (_, *there) in enumerate(self.coords):
            found.setdefault(tuple(there), []).append(number)
        return tuple(tuple(numbers) for numbers in found.values())

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(int(n) for n in self.place.max(axis=0) + 1)

    @functools.cached_property
    def rings(self) -> tuple[bool, ...]:
        """Which axes close to a ring: of a 3D slice all, if all are multiples of 4; of a 2D slice those of 16 chips."""
        x, y, z = self.shape[1:4]
        cube = all(n % 4 == 0 for n in (x, y, z))
        closed = (cube, cube, cube) if self.chip.links == 6 else (x == 16, y == 16, False)
        return (False, *closed, False)

    def axes(self, collective: Collective) -> tuple[str, ...]:
        """The axes along which the members of a group differ: whose links the collective uses."""
        place = self.place[np.array(collective.groups[0])]
        return tuple(AXES[i] for i in range(len(AXES)) if len(set(place[:, i])) > 1)

    def seconds(self, collective: Collective) -> float:
        """Time of the collective alone, every group of it at work at once."""
        return _seconds(self, collective)

    def _capacity(self, axis: int) -> float:
        """Bytes a second over one border that crosses `axis`, one way."""
        devices = len(self.coords) // self.shape[axis]
        if AXES[axis] == "slice":
            return devices * self.chip.dcn / self._cores
        if AXES[axis] == "core":
            return devices * self.chip.links * self.chip.link  # cores of a chip share memory: as fast as all its links
        return devices / self._cores * self.chip.link

    @property
    def _cores(self) -> int:
        return self.shape[4]

    def cuts(self, axes: Sequence[str]) -> list[tuple[np.ndarray, float]]:
        """(bool [devices]: one side, bytes a second over the border one way) of the cuts that `axes` suggest."""
        found = []
        for axis in (AXES.index(name) for name in axes):
            n, at = self.shape[axis], self.place[:, axis]
            for start in range(n if self.rings[axis] else 1):
                for length in range(1, n):
                    side = (at - start) % n < length
                    found.append((side, self._capacity(axis) * (2 if self.rings[axis] else 1)))
        chips = {tuple(place[:4]): None for place in self.coords}
        for chip in chips:
            side = (self.place[:, :4] == np.array(chip)).all(axis=1)
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
    here = sides.astype(float) @ member.T.astype(float)  # [cuts, groups]: members on one side
    n = groups.shape[1]
    there = n - here
    both = (here > 0) & (there > 0)
    size = collective.bytes
    match collective.kind:
        case "all-gather":
            crossing = np.where(both, np.maximum(here, there), 0) * size
        case "reduce-scatter":
            crossing = np.where(both, np.maximum(here, there), 0) * size / n
        case "all-reduce":
            crossing = 2 * np.where(both, np.maximum(here, there), 0) * size / n
        case "all-to-all" | "ragged-all-to-all":
            crossing = here * there * size / n
        case "collective-permute":
            leaves = sides[:, groups[:, 0]] & ~sides[:, groups[:, 1]]
            enters = ~sides[:, groups[:, 0]] & sides[:, groups[:, 1]]
            crossing = np.maximum(leaves.sum(axis=1), enters.sum(axis=1))[:, None] * size
        case _:
            crossing = both * size
    hops = sum(
        torus.shape[i] // 2 if torus.rings[i] else torus.shape[i] - 1 for i in (AXES.index(name) for name in axes)
    )
    return float((crossing.sum(axis=1) / capacity).max()) + hops * _HOP


def _permuted(torus: Torus, pairs: np.ndarray) -> tuple[str, ...]:
    moved = (torus.place[pairs[:, 0]] != torus.place[pairs[:, 1]]).any(axis=0)
    return tuple(name for name, moves in zip(AXES, moved, strict=True) if moves)


def place(device: object) -> tuple[int, int, int, int, int]:
    """(slice, x, y, z, core) of a JAX device of a TPU."""
    x, y, z = getattr(device, "coords", (0, 0, 0))
    return getattr(device, "slice_index", 0), x, y, z, getattr(device, "core_on_chip", 0)
