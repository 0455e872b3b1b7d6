"""The time model: simulates the compiler's schedule with one clock for the core and one for each axis of the torus.

The core runs the instructions in the compiler's order.

- An instruction takes the cycles that the compiler estimates. Gathers, scatters and sorts have no estimate: see
  `_unestimated_seconds`. The caller gives the time of each Pallas kernel.
- A synchronous collective stops the core until it ends (network.py).
- An asynchronous collective starts when the links of its axes are free and runs in parallel with the core. The core
  waits at the -done instruction if the collective is still running: only this wait is exposed communication.
  Collectives of up to 64 KiB do not wait for links.
- A collective between slices is compiled to a send and a receive through the hosts. It starts at the send, and the core
  waits at the end of the receive.
- A copy between HBM and VMEM runs in parallel with the core, at the HBM's bandwidth.
- A loop's body is simulated for two iterations; the second stands for all later ones.
- A conditional takes its slowest branch.

All times are estimates; none was measured.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from dsv2_jax.plan.hlo import Computation, HloInstruction, Module, TripCounts, arrays, is_kernel, size
from dsv2_jax.plan.network import Collective, Torus, collective_of
from pallas_kernels.chips import Chip

KernelSeconds = Callable[[HloInstruction, Computation], float]
_NO_TIME = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
_HBM = "hbm"
_SMALL = 2**16  # bytes; a collective this small interleaves with the packets of a large one
_NO_TIME_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding")
_EXCHANGES = 1024  # numbers that the vector unit compares and exchanges in _EXCHANGE_CYCLES
_EXCHANGE_CYCLES = 4  # two selects, a compare and a move


@dataclasses.dataclass
class Use:
    """Time of all executions of one or more instructions, in seconds."""

    count: int = 0
    busy: float = 0.0  # of the core or of the links
    core: float = 0.0  # of the core, waits included
    exposed: float = 0.0  # the part of `core` that waits for links or copies
    wire: float = 0.0  # bytes that the device sends

    def add(self, other: "Use", times: int = 1) -> None:
        """Adds `times` executions of another use."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class TimelineEvent:
    """One instruction in a loop iteration, in seconds from the start of the iteration."""

    resource: str  # "core", or the axes whose links are in use: "x", "x y"
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """A simulated loop."""

    name: str
    source: str
    iterations: int
    seconds: float  # of one iteration
    executions: int  # how often the program runs the complete loop
    events: tuple[TimelineEvent, ...]  # of the second iteration, with one event for each inner loop


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One execution of a program on one device."""

    seconds: float
    uses: Mapping[tuple[str, str], Use]  # (computation, instruction) -> its use
    loops: tuple[Loop, ...]
    unknown_loops: tuple[str, ...]  # those whose trip count depends on data


def simulate(
    module: Module,
    torus: Torus,
    kernel_seconds: KernelSeconds,
    *,
    unknown_loop_seconds: float | None = None,
    fastest_branch: bool = False,
) -> Timeline:
    """Simulates one execution of a program.

    kernel_seconds: time of one call of a Pallas kernel, given the instruction and its computation.
    unknown_loop_seconds: time of a loop whose trip count depends on data; None counts one iteration.
    fastest_branch: take the fastest branch of a conditional instead of the slowest.
    """
    simulator = _Simulator(module, torus, kernel_seconds, unknown_loop_seconds, fastest_branch)
    uses = simulator.run(module.computations[module.entry], {})
    unknown = tuple(dict.fromkeys(simulator.trip_counts.unknown))
    return Timeline(simulator.now, uses, tuple(simulator.loops), unknown)


class _Simulator:
    def __init__(
        self,
        module: Module,
        torus: Torus,
        kernel_seconds: KernelSeconds,
        unknown_loop_seconds: float | None,
        fastest_branch: bool,
    ) -> None:
        self._module, self._torus, self._kernel_seconds = module, torus, kernel_seconds
        self._unknown_loop_seconds, self._fastest_branch = unknown_loop_seconds, fastest_branch
        self.trip_counts = TripCounts(module)
        self.now = 0.0
        self.loops: list[Loop] = []
        self._free: dict[str, float] = collections.defaultdict(float)  # when the links of an axis become free
        self._ends: dict[str, float] = {}  # when asynchronous operations end
        self._events: list[TimelineEvent] = []
        self._executions = 1

    def run(self, computation: Computation, known: Mapping[int, int]) -> dict[tuple[str, str], Use]:
        """Advances the clocks by one execution of a computation; returns the use of each instruction."""
        uses: dict[tuple[str, str], Use] = {}
        for instruction in computation.instructions:
            if instruction.op in _NO_TIME:
                continue
            if instruction.op == "while":
                _merge(uses, self._loop(instruction, computation, known))
            elif instruction.op == "conditional":
                _merge(uses, self._condition(instruction))
            elif instruction.op == "call":
                called = self._module.computations[instruction.attribute("to_apply") or ""]
                _merge(uses, self.run(called, {}))
            else:
                use = self._instruction(instruction, computation)
                if use is not None:
                    _merge(uses, {(computation.name, instruction.name): use})
        return uses

    def _loop(self, loop: HloInstruction, where: Computation, known: Mapping[int, int]) -> dict[tuple[str, str], Use]:
        iterations, constant = self.trip_counts.count(loop, where, known)
        if self._unknown_loop_seconds is not None and loop.name in self.trip_counts.unknown:
            return {(where.name, loop.name): self._core(loop, self._unknown_loop_seconds)}
        body = self._module.computations[loop.attribute("body") or ""]
        uses: dict[tuple[str, str], Use] = {}
        enclosing, start = self._events, self.now
        self._executions *= max(iterations, 1)
        last: dict[tuple[str, str], Use] = {}
        seconds, events = 0.0, []
        for _ in range(min(iterations, 2)):
            self._events, begin = [], self.now
            last = self.run(body, constant)
            seconds, events = self.now - begin, [_moved(event, -begin) for event in self._events]
            _merge(uses, last)
        self._executions //= max(iterations, 1)
        if iterations > 2:
            _merge(uses, last, iterations - 2)
            self._shift((iterations - 2) * seconds)
        source = self._module.source(loop)
        self.loops.append(Loop(loop.name, source, iterations, seconds, self._executions, tuple(events)))
        self._events = [*enclosing, TimelineEvent("core", f"loop of {iterations} at {source}", start, self.now)]
        return uses

    def _shift(self, seconds: float) -> None:
        self.now += seconds
        for axis in self._free:
            self._free[axis] += seconds
        for name in self._ends:
            self._ends[name] += seconds

    def _condition(self, instruction: HloInstruction) -> dict[tuple[str, str], Use]:
        named = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"[\w.\-]+", named[1]) if named else []
        names = names or [instruction.attribute(f"{which}_computation") or "" for which in ("true", "false")]
        best: tuple[float, dict, dict, dict] | None = None
        before = self.now, dict(self._free), dict(self._ends)
        for name in names:
            self.now, self._ends = before[0], dict(before[2])
            self._free = collections.defaultdict(float, before[1])
            uses = self.run(self._module.computations[name], {})
            if best is None or (self.now < best[0]) == self._fastest_branch:
                best = self.now, uses, dict(self._free), dict(self._ends)
        assert best is not None
        self.now, uses, free, self._ends = best
        self._free = collections.defaultdict(float, free)
        return uses

    def _instruction(self, instruction: HloInstruction, where: Computation) -> Use | None:
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
            return self._asynchronous(instruction, (_HBM,), copied / (self._torus.chip.hbm * self._torus.chip.cores))
        if op.endswith("-start"):
            return self._asynchronous(instruction, (instruction.attribute("async_execution_thread") or "other",), 0.0)
        if is_kernel(instruction):
            return self._core(instruction, self._kernel_seconds(instruction, where))
        if instruction.cycles is None:
            return self._core(instruction, _unestimated_seconds(instruction, where, self._module, self._torus.chip))
        return self._core(instruction, instruction.cycles / self._torus.chip.clock)

    def _core(self, instruction: HloInstruction, seconds: float) -> Use:
        self._event("core", instruction, self.now, self.now + seconds)
        self.now += seconds
        return Use(1, seconds, seconds)

    def _collective(self, instruction: HloInstruction, collective: Collective, asynchronous: bool) -> Use:
        axes, seconds = self._torus.axes(collective), self._torus.seconds(collective)
        use = self._asynchronous(instruction, axes if collective.wire > _SMALL else (), seconds)
        use.wire = collective.wire
        if not asynchronous:
            use.exposed = use.core = self._ends.pop(_transfer(instruction)) - self.now
            self._event("core", instruction, self.now, self.now + use.core)
            self.now += use.core
        return use

    def _asynchronous(self, instruction: HloInstruction, resources: tuple[str, ...], seconds: float) -> Use:
        start = max([self.now, *(self._free[resource] for resource in resources)])
        for resource in resources:
            self._free[resource] = start + seconds
        self._ends[_transfer(instruction)] = start + seconds
        if resources != (_HBM,):
            self._event(" ".join(resources), instruction, start, start + seconds)
        return Use(1, seconds)

    def _wait(self, instruction: HloInstruction, where: Computation) -> Use:
        if instruction.op == "send-done":  # only frees the buffer: the core waits at the receive
            return Use(1)
        begun = where.by_name.get(instruction.operands[0])
        key = _transfer(begun) if begun else instruction.operands[0]
        wait = max(0.0, self._ends.pop(key, self.now) - self.now)
        if wait:
            self._event("core", instruction, self.now, self.now + wait)
        self.now += wait
        return Use(1, 0.0, wait, wait)

    def _event(self, resource: str, instruction: HloInstruction, start: float, end: float) -> None:
        self._events.append(
            TimelineEvent(resource, f"{instruction.name} {self._module.source(instruction)}", start, end)
        )


def _transfer(instruction: HloInstruction) -> str:
    """A key for the two ends of a transfer: the rendezvous of a send and its receive, else the instruction's name."""
    return instruction.attribute("_xla_host_transfer_rendezvous") or instruction.name


def _moved(event: TimelineEvent, seconds: float) -> TimelineEvent:
    return dataclasses.replace(event, start=event.start + seconds, end=event.end + seconds)


def _merge(uses: dict[tuple[str, str], Use], more: Mapping[tuple[str, str], Use], times: int = 1) -> None:
    for key, use in more.items():
        uses.setdefault(key, Use()).add(use, times)


def _unestimated_seconds(instruction: HloInstruction, where: Computation, module: Module, chip: Chip) -> float:
    """Estimates one execution of an instruction that has no `estimated_cycles`.

    Rough and optimistic: data moves at the HBM's full bandwidth, however short the rows of a gather or scatter are, and
    a sort is a bitonic network on the vector unit.
    """
    if instruction.op == "custom-call" and any(f'"{name}"' in instruction.attributes for name in _NO_TIME_CALLS):
        return 0.0
    if instruction.op == "sort":
        return _sort_cycles(instruction) / chip.clock / chip.cores
    return _bytes_moved(instruction, where, module) / (chip.hbm * chip.cores)


def _sort_cycles(instruction: HloInstruction) -> float:
    operands = arrays(instruction.shape)
    dims = operands[0][1]
    along = int((instruction.attribute("dimensions") or "0").split(",")[0])
    stages = math.ceil(math.log2(max(2, dims[along])))
    return stages * (stages + 1) / 2 * math.prod(dims) * len(operands) * _EXCHANGE_CYCLES / _EXCHANGES


def _bytes_moved(instruction: HloInstruction, where: Computation, module: Module) -> float:
    """Bytes read and written."""
    if instruction.op == "fusion":
        inside = module.computations[instruction.attribute("calls") or ""]
        for nested in inside.instructions:
            if nested.op == "scatter":
                return 3 * size(inside.by_name[nested.operands[-1]].shape)  # reads updates and targets, writes targets
            if nested.op == "dynamic-update-slice":
                return 2 * size(inside.by_name[nested.operands[1]].shape)
        return 2 * size(instruction.shape)
    if instruction.op in ("scatter", "dynamic-update-slice"):
        update = instruction.operands[-1 if instruction.op == "scatter" else 1]
        return 3 * size(where.by_name[update].shape)
    return 2 * size(instruction.shape)
