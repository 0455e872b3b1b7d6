"""The model of time: a device's schedule played on one clock for its core and one for each axis of its torus.

The core runs the instructions one after the other, in the compiler's order. An instruction takes the cycles that the
compiler estimates, or what unpriced.py makes of it; a Pallas kernel takes what the caller says. A synchronous
collective stops the core for as long as it takes (network.py). An asynchronous one starts when the links of its axes
are free and runs beside the core, which waits at its end if it comes too early: only that wait is exposed. Those of up
to 64 KiB wait for no links. What slices do together is compiled to a send and a receive by way of their hosts: it
begins with the send, and the core waits where the receive is done. Copies between HBM and VMEM run beside the core at
the HBM's bandwidth. A loop's body is played twice, and the second time stands for all others. Of a condition the
dearest branch is taken. Nothing here was measured.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping

from dsv2_jax.plan import unpriced
from dsv2_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Module, Trips, is_kernel, size
from dsv2_jax.plan.network import Collective, Groups, Torus

KernelSeconds = Callable[[Instruction, Computation], float]
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
_HBM = "hbm"
_SMALL = 2**16  # bytes that find their way between the packets of a large transfer


@dataclasses.dataclass
class Use:
    """All executions of one instruction, or of many: seconds."""

    count: int = 0
    busy: float = 0.0  # of the core, or of the links
    core: float = 0.0  # of the core alone, waiting included
    exposed: float = 0.0  # of the core, waiting for links or copies
    wire: float = 0.0  # bytes

    def add(self, other: "Use", times: int = 1) -> None:
        """Adds another use, so many times."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Event:
    """One instruction in the picture of a loop's turn: seconds from its beginning."""

    lane: str  # core, or the links: "x", "x y"
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop as it was played."""

    name: str
    source: str
    turns: int
    seconds: float  # of one turn
    executions: int  # of the whole loop
    events: tuple[Event, ...]  # of its second turn, inner loops as one


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One execution of a program on one device."""

    seconds: float
    uses: Mapping[tuple[str, str], Use]  # by computation and instruction
    loops: tuple[Loop, ...]
    unsolved: tuple[str, ...]  # loops whose turns depend on data


def play(
    module: Module,
    torus: Torus,
    kernel_seconds: KernelSeconds,
    *,
    unsolved_seconds: float | None = None,
    cheapest: bool = False,
) -> Timeline:
    """Plays a whole program. kernel_seconds: of one call of a Pallas kernel, given with the computation around it.

    unsolved_seconds: of a loop whose turns depend on data; without it, such a loop is played once. cheapest: take the
    cheapest branch of a condition, not the dearest.
    """
    player = _Player(module, torus, kernel_seconds, unsolved_seconds, cheapest)
    uses = player.run(module.computations[module.entry], {})
    return Timeline(player.now, uses, tuple(player.loops), tuple(dict.fromkeys(player.trips.unsolved)))


def groups(instruction: Instruction, devices: int) -> Groups:
    """The devices that work together, by their numbers in the program."""
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
    import numpy as np

    numbers = np.arange(int(np.prod(dims))).reshape(dims)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(tuple(int(n) for n in row) for row in numbers.reshape(shape))


class _Player:
    def __init__(
        self,
        module: Module,
        torus: Torus,
        kernel_seconds: KernelSeconds,
        unsolved_seconds: float | None,
        cheapest: bool,
    ) -> None:
        self._module, self._torus, self._kernel_seconds = module, torus, kernel_seconds
        self._unsolved_seconds, self._cheapest = unsolved_seconds, cheapest
        self.trips = Trips(module)
        self.now = 0.0
        self.loops: list[Loop] = []
        self._free: dict[str, float] = collections.defaultdict(float)  # when the links of an axis are free
        self._ends: dict[str, float] = {}  # of what runs beside the core
        self._events: list[Event] = []
        self._executions = 1

    def run(self, computation: Computation, known: Mapping[int, int]) -> dict[tuple[str, str], Use]:
        """Plays a computation; what each instruction used."""
        uses: dict[tuple[str, str], Use] = {}
        for instruction in computation.instructions:
            if instruction.op in _FREE:
                continue
            if instruction.op == "while":
                _merge(uses, self._loop(instruction, computation, known))
            elif instruction.op == "conditional":
                _merge(uses, self._condition(instruction))
            elif instruction.op == "call":
                called = self._module.computations[instruction.attribute("to_apply") or ""]
                _merge(uses, self.run(called, {}))
            else:
                use = self._one(instruction, computation)
                if use is not None:
                    _merge(uses, {(computation.name, instruction.name): use})
        return uses

    def _loop(self, loop: Instruction, where: Computation, known: Mapping[int, int]) -> dict[tuple[str, str], Use]:
        turns, fixed = self.trips.count(loop, where, known)
        if self._unsolved_seconds is not None and loop.name in self.trips.unsolved:
            return {(where.name, loop.name): self._core(loop, self._unsolved_seconds)}
        body = self._module.computations[loop.attribute("body") or ""]
        uses: dict[tuple[str, str], Use] = {}
        around, start = self._events, self.now
        self._executions *= max(turns, 1)
        turn: dict[tuple[str, str], Use] = {}
        seconds, mine = 0.0, []
        for _ in range(min(turns, 2)):
            self._events, begin = [], self.now
            turn = self.run(body, fixed)
            seconds, mine = self.now - begin, [_moved(event, -begin) for event in self._events]
            _merge(uses, turn)
        self._executions //= max(turns, 1)
        if turns > 2:
            _merge(uses, turn, turns - 2)
            self._shift((turns - 2) * seconds)
        label = self._module.source(loop)
        self.loops.append(Loop(loop.name, label, turns, seconds, self._executions, tuple(mine)))
        self._events = [*around, Event("core", f"loop of {turns} at {label}", start, self.now)]
        return uses

    def _shift(self, seconds: float) -> None:
        self.now += seconds
        for lane in self._free:
            self._free[lane] += seconds
        for name in self._ends:
            self._ends[name] += seconds

    def _condition(self, instruction: Instruction) -> dict[tuple[str, str], Use]:
        named = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", named[1]) if named else []
        names = names or [instruction.attribute(f"{which}_computation") or "" for which in ("true", "false")]
        best: tuple[float, dict, dict, dict] | None = None
        before = self.now, dict(self._free), dict(self._ends)
        for name in names:
            self.now, self._ends = before[0], dict(before[2])
            self._free = collections.defaultdict(float, before[1])
            uses = self.run(self._module.computations[name], {})
            if best is None or (self.now < best[0]) == self._cheapest:
                best = self.now, uses, dict(self._free), dict(self._ends)
        assert best is not None
        self.now, uses, free, self._ends = best
        self._free = collections.defaultdict(float, free)
        return uses

    def _one(self, instruction: Instruction, where: Computation) -> Use | None:
        op = instruction.op
        if op.endswith("-done"):
            return self._wait(instruction, where)
        collective = collective_of(instruction, where, self._module, self._torus)
        if collective is not None:
            return self._collective(instruction, collective, asynchronous=op.endswith(("-start", "-update", "send")))
        if op.endswith(("-update", "recv")) or (op == "async-start" and not instruction.operands):
            return None
        if op == "copy-start":
            copied = size(where.by_name[instruction.operands[0]].shape)
            return self._beside(instruction, (_HBM,), copied / (self._torus.chip.hbm * self._torus.chip.cores))
        if op.endswith("-start"):
            return self._beside(instruction, (instruction.attribute("async_execution_thread") or "other",), 0.0)
        if is_kernel(instruction):
            return self._core(instruction, self._kernel_seconds(instruction, where))
        if instruction.cycles is None:
            return self._core(instruction, unpriced.seconds(instruction, where, self._module, self._torus.chip))
        return self._core(instruction, instruction.cycles / self._torus.chip.clock)

    def _core(self, instruction: Instruction, seconds: float) -> Use:
        self._event("core", instruction, self.now, self.now + seconds)
        self.now += seconds
        return Use(1, seconds, seconds)

    def _collective(self, instruction: Instruction, collective: Collective, asynchronous: bool) -> Use:
        lanes, seconds = self._torus.axes(collective), self._torus.seconds(collective)
        use = self._beside(instruction, lanes if collective.wire > _SMALL else (), seconds)
        use.wire = collective.wire
        if not asynchronous:
            use.exposed = use.core = self._ends.pop(_transfer(instruction)) - self.now
            self._event("core", instruction, self.now, self.now + use.core)
            self.now += use.core
        return use

    def _beside(self, instruction: Instruction, lanes: tuple[str, ...], seconds: float) -> Use:
        start = max([self.now, *(self._free[lane] for lane in lanes)])
        for lane in lanes:
            self._free[lane] = start + seconds
        self._ends[_transfer(instruction)] = start + seconds
        if lanes != (_HBM,):
            self._event(" ".join(lanes), instruction, start, start + seconds)
        return Use(1, seconds)

    def _wait(self, instruction: Instruction, where: Computation) -> Use:
        if instruction.op == "send-done":  # the buffer may be written again; what was sent is awaited where it arrives
            return Use(1)
        begun = where.by_name.get(instruction.operands[0])
        key = _transfer(begun) if begun else instruction.operands[0]
        wait = max(0.0, self._ends.pop(key, self.now) - self.now)
        if wait:
            self._event("core", instruction, self.now, self.now + wait)
        self.now += wait
        return Use(1, 0.0, wait, wait)

    def _event(self, lane: str, instruction: Instruction, start: float, end: float) -> None:
        self._events.append(Event(lane, f"{instruction.name} {self._module.source(instruction)}", start, end))


def _transfer(instruction: Instruction) -> str:
    """What the two ends of a transfer have in common: of a send and its receive their meeting, else the name."""
    return instruction.attribute("_xla_host_transfer_rendezvous") or instruction.name


def collective_of(instruction: Instruction, where: Computation, module: Module, torus: Torus) -> Collective | None:
    """The collective that an instruction is or begins, or that a fusion or an asynchronous call consists of.

    An async-start without operands only makes ready what its async-update begins.
    """
    between_slices = instruction.attribute("_xla_megascale_transfer_type") if instruction.op == "send" else None
    if between_slices:
        kind = between_slices.strip('"').lower().replace("_", "-")
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
        return Collective(kind, groups(instruction, module.devices), _operand_bytes(instruction, kind, where))
    called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
    inside = module.computations.get(called) if kind in ("async", "fusion", "call") else None
    for one in inside.instructions if inside else ():
        found = collective_of(one, inside, module, torus) if inside and one.kind != "fusion" else None
        if found is not None:
            scatters = found.kind == "all-reduce" and "scatter" in called
            return dataclasses.replace(found, kind="reduce-scatter") if scatters else found
    return None


def _operand_bytes(instruction: Instruction, kind: str, where: Computation) -> int:
    operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    return sum(size(where.by_name[name].shape) for name in operands if name in where.by_name)


def _moved(event: Event, seconds: float) -> Event:
    return dataclasses.replace(event, start=event.start + seconds, end=event.end + seconds)


def _merge(uses: dict[tuple[str, str], Use], more: Mapping[tuple[str, str], Use], times: int = 1) -> None:
    for key, use in more.items():
        uses.setdefault(key, Use()).add(use, times)
