"""Executes the scalar half of a kernel's final bundles: branches, loops, copies and waits, with their time.

Trip counts, skipped blocks and copied bytes are therefore exact for given values of the scalar operands. The time is
that of the schedule of each straight run of bundles plus the waits for copies, which use the HBM one after another.
Unknown values (results of vector work, operands without values) are None. A branch that depends on an unknown value is
not taken, and a warning reports it.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.chips import Chip
from pallas_kernels.pricing import bundles
from pallas_kernels.pricing.bundles import CORE_ID, BundleInstruction, Schedule

_MASK = 0xFFFFFFFF
_GRANULE = 32  # bytes: the unit of a copy's size
_HBM_LATENCY = 700  # assumed cycles from a copy's last byte in HBM to its semaphore
_LOCAL_LATENCY, _LOCAL_BYTES = 100, 512  # of copies within the core: cycles, and bytes per cycle
_SKIPPED = object()
_MAX_RUNS = 5_000_000  # straight runs to execute

Value = int | None
Read = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A straight run of bundles, and how often it executed."""

    address: int
    trips: int
    schedule: Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The execution of a kernel on one core."""

    cycles: float
    stalled: float  # cycles spent waiting for copies
    hbm_cycles: float  # cycles in which the HBM is busy
    copies: Mapping[str, int]  # by direction, as in "hbm_to_vmem"
    copied: Mapping[str, int]  # bytes by direction
    runs: tuple[Run, ...]  # by total time, longest first
    warnings: tuple[str, ...]  # why the figures may be wrong


def execute(program: bundles.KernelProgram, chip: Chip, operands: Mapping[int, np.ndarray]) -> Trace:
    """Executes a kernel on the first core of a chip. operands: known integer operands, by position."""
    return _Machine(program, chip, operands).run()


@dataclasses.dataclass(frozen=True)
class _Block:
    """A compiled straight run. In each bundle all instructions read before any of them acts."""

    steps: tuple[tuple[int, tuple[tuple[Read, Callable[[Any], None]], ...]], ...]
    following: int
    schedule: Schedule


class _Machine:
    def __init__(self, program: bundles.KernelProgram, chip: Chip, operands: Mapping[int, np.ndarray]):
        self.program, self.chip, self.operands = program, chip, operands
        self.labels = {self._target(i) for bundle in program.bundles for i in bundle if i.op.startswith("sbr")}
        self.registers: dict[str, list[Value]] = {"s": [0] * 64, "p": [0] * 64}
        self.smem: dict[int, Value] = {}
        self.bases: dict[str, int] = {}
        self.next = self.offset = 0
        self.now = self.hbm_free = self.hbm_cycles = self.stalled = 0.0
        self.flags: dict[Value, int] = collections.defaultdict(int)
        self.arriving: dict[Value, list[tuple[float, int]]] = collections.defaultdict(list)
        self.copies: dict[str, int] = collections.Counter()
        self.copied: dict[str, int] = collections.Counter()
        self.warnings: dict[str, int] = collections.Counter()

    def run(self) -> Trace:
        blocks: dict[int, _Block] = {}
        trips: dict[int, int] = collections.Counter()
        at, length = 0, len(self.program.bundles)
        for _ in range(_MAX_RUNS):
            if at >= length:
                break
            if at not in blocks:
                blocks[at] = self._compile(at)
            block = blocks[at]
            trips[at] += 1
            self.next = block.following
            for offset, parts in block.steps:
                self.offset = offset
                for (_, act), value in zip(parts, [read() for read, _ in parts], strict=True):
                    if value is not _SKIPPED:
                        act(value)
            self.now += block.schedule.cycles
            at = self.next
        else:
            self.warnings[f"stopped after {_MAX_RUNS} runs"] += 1
        runs = [Run(address=at, trips=trips[at], schedule=block.schedule) for at, block in blocks.items()]
        return Trace(
            cycles=self.now,
            stalled=self.stalled,
            hbm_cycles=self.hbm_cycles,
            copies=dict(self.copies),
            copied=dict(self.copied),
            runs=tuple(sorted(runs, key=lambda run: -run.trips * run.schedule.cycles)),
            warnings=tuple(f"{text} (x{n})" for text, n in self.warnings.items()),
        )

    def _compile(self, start: int) -> _Block:
        program = self.program.bundles
        end = start
        while end < len(program) and not _branches(program[end]):
            end += 1
        last = min(end + 1 + self.chip.delay_slots, len(program))
        end = next((n for n in range(end + 1, last) if n in self.labels or _branches(program[n])), last)
        timing = bundles.schedule(program[start:end], self.chip)
        steps = []
        for offset, bundle in zip(timing.starts, program[start:end], strict=True):
            parts = tuple(part for i in bundle if (part := self._part(i)))
            if parts:
                steps.append((offset, parts))
        return _Block(tuple(steps), end, timing)

    def _part(self, i: BundleInstruction) -> tuple[Read, Callable[[Any], None]] | None:
        """An instruction's reads and its effect on them. None for the vector half and for pseudo-operations."""
        part = self._effect(i) or self._assignment(i)
        if part is None or not i.guard:
            return part
        read, act = part
        holds, kept = self._read(i.guard), self._read(i.kept) if i.kept else lambda: _SKIPPED

        def guarded() -> Any:
            held = holds()
            if held is None and i.op.startswith(("sbr", "dma", "vsyncadd")):
                self.warnings[f"{i.op} depends on an unknown value"] += 1
            return read() if held else kept()

        return guarded, act

    def _effect(self, i: BundleInstruction) -> tuple[Read, Callable[[Any], None]] | None:
        """The same for instructions that do more than write a register."""
        if i.op.startswith("dma.done"):
            flag, size = map(self._read, i.operands[:2])
            return lambda: (flag(), size()), lambda v: self._wait(*v)
        if i.op.startswith("dma."):
            reads = [self._read(x) for x in i.operands[:4]]  # source, size, destination, flag
            kind = i.op.removeprefix("dma.")
            return lambda: [read() for read in reads], lambda v: self._copy(kind, *v)
        if i.op == "vsyncadd" and "remote" not in i.op:
            flag, change = map(self._read, i.operands[:2])
            return lambda: (flag(), change()), lambda v: self._add(*v)
        if i.op == "sst":
            place, value = i.operands[0].rsplit(" ", 1) if len(i.operands) == 1 else i.operands[:2]
            address, read = self._read(place), self._read(value)
            return lambda: (address(), read()), lambda v: self.smem.__setitem__(*v)
        if i.op.startswith("sbr"):
            target = self._target(i)
            return lambda: target, lambda v: setattr(self, "next", v)
        return None

    def _target(self, branch: BundleInstruction) -> int:
        """The bundle of the branch's target.

        A region without bundles is the program's end, which a core without a part of the grid branches to.
        """
        return self.program.regions.get(branch.text.rsplit("region", 1)[1], len(self.program.bundles))

    def _assignment(self, i: BundleInstruction) -> tuple[Read, Callable[[Any], None]] | None:
        match = re.fullmatch(r"%\w+_([sp])(\d+)", i.target)
        if not match or i.op.startswith(("sphi", "pphi", "int_to_ptr", "ptr_to_int")):
            return None  # pseudo-operations keep their value in the same register
        file, number = self.registers[match[1]], int(match[2])
        return self._expression(i), lambda v: file.__setitem__(number, v)

    def _expression(self, i: BundleInstruction) -> Read:
        if i.op.startswith("inlined_call_operand"):
            return self._operand(i)
        if i.op == "sld":
            if i.text.endswith(CORE_ID):
                return lambda: 0
            address = self._read(i.operands[0])
            return lambda: self.smem.get(address())
        function = _function(i.op)
        if function is None:
            return lambda: None
        reads = [self._read(x) for x in i.operands]

        def compute() -> Value:
            try:
                return function(*(read() for read in reads))
            except TypeError:  # an operand is unknown
                return None

        return compute

    def _operand(self, i: BundleInstruction) -> Read:
        """A scalar's value or an array's address. Known values of an array are put into the scalar memory."""
        index = int(i.text.split("index: ", 1)[1].split(",")[0])
        known = self.operands.get(index)
        if "no memory space" in i.text:
            value = None if known is None else int(known.reshape(-1)[0]) & _MASK
            return lambda: value
        base = (index + 1) << 18
        if i.op.endswith("smem"):
            self._fill(base, index)
        return lambda: base

    def _fill(self, base: int, index: int) -> None:
        if index in self.operands:
            self.smem |= {base + n: word for n, word in enumerate(smem_words(self.operands[index]))}

    def _read(self, text: str) -> Read:
        """The value of an operand: a register, a number, or an address `[space:[base + ...]]`."""
        text = re.sub(r"^([^\s\[]+) \[.*\]$", r"\1", text)  # drops the allocation after a value
        if text.startswith("!"):
            inner = self._read(text[1:])
            return lambda: None if (value := inner()) is None else 1 - value
        register = re.fullmatch(r"%\w+_([sp])(\d+)", text)
        if register:
            file, number = self.registers[register[1]], int(register[2])
            return lambda: file[number]
        constant = _constant(text)
        if constant is not None:
            return lambda: constant
        terms = re.findall(r"#[\w.]+|\$?0x[0-9a-f]+|%\w+|-?\d+", text.split("] [")[0])
        if not text.startswith("[") or not terms:
            self.warnings[f"unknown operand {text}"] += 1
            return lambda: None
        fixed, reads = 0, []
        for term in terms:
            if term.startswith("%"):
                reads.append(self._read(term))
            elif term.startswith("#"):
                fixed += self.bases.setdefault(term, (1 << 29) + (len(self.bases) + 1 << 18))
            else:
                fixed += int(term.lstrip("$"), 0)
        if not reads:
            return lambda: fixed & _MASK

        def address() -> Value:
            values = [read() for read in reads]
            return None if None in values else (fixed + sum(values)) & _MASK

        return address

    def _copy(self, kind: str, source: Value, size: Value, target: Value, flag: Value) -> None:
        if size is None:
            self.warnings[f"copy {kind} of unknown size"] += 1
            return
        moment, count = self.now + self.offset, size * _GRANULE
        if "hbm" in kind:
            cycles = count * self.chip.clock / self.chip.hbm
            self.hbm_free = max(moment, self.hbm_free) + cycles
            self.hbm_cycles += cycles
            done = self.hbm_free + _HBM_LATENCY
        else:
            done = moment + _LOCAL_LATENCY + count / _LOCAL_BYTES
        if kind.endswith("to_smem") and source is not None and target is not None:
            self._fill(target, (source >> 18) - 1 if source < 1 << 22 else (source >> 22) - 1)
        self.copies[kind] += 1
        self.copied[kind] += count
        self.arriving[flag].append((done, size))

    def _wait(self, flag: Value, size: Value) -> None:
        """Stalls until copies that signal the flag, in the order of their arrival, have the given size."""
        queue = sorted(self.arriving[flag])
        moment = last = self.now + self.offset
        while queue and self.flags[flag] < (size or 0):
            done, part = queue.pop(0)
            self.flags[flag] += part
            last = max(last, done)
        self.arriving[flag] = queue
        self.stalled += last - moment
        self.now += last - moment

    def _add(self, flag: Value, change: Value) -> None:
        self.flags[flag] += _signed(change or 0)


def _branches(bundle: Sequence[BundleInstruction]) -> bool:
    return any(i.op.startswith("sbr") for i in bundle)


def smem_words(values: np.ndarray) -> list[int]:
    """Integers as the 32-bit words of the scalar memory.

    Rows of a matrix are padded to 128 numbers. Narrow integers share words, n per word: one from each of n runs of 128
    numbers of a vector, or of n rows of a matrix, in tiles of 8 rows.
    """
    per_word = 4 // min(4, values.dtype.itemsize)
    words = values.astype(np.int64) & 2 ** (32 // per_word) - 1
    if words.ndim > 1:
        words = words.reshape(-1, *words.shape[-2:])
        words = np.pad(words, ((0, 0), (0, -words.shape[1] % per_word), (0, -words.shape[2] % 128)))
    if per_word > 1:
        if words.ndim <= 1:
            words = np.pad(words.reshape(-1), (0, -words.size % (128 * per_word))).reshape(-1, per_word, 1, 128)
        else:
            words = words.reshape(words.shape[0], -1, per_word, words.shape[2] // 128, 128)
            words = words.reshape(-1, *words.shape[2:])
        shifts = 32 // per_word * np.arange(per_word)
        words = np.sum(words << shifts[:, None, None], axis=1)  # [rows of words, tiles of a row, 128]
        tile = min(8 // per_word, len(words)) if values.ndim > 1 and len(words) % (8 // per_word) == 0 else 1
        words = words.reshape(-1, tile, *words.shape[1:]).swapaxes(1, 2)
    return words.reshape(-1).tolist()


def _signed(value: int) -> int:
    return (value + 2**31 & _MASK) - 2**31


def _constant(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    return int(text, 0) & _MASK if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text) else None


def _and(a: Value, b: Value) -> Value:
    return 0 if a == 0 or b == 0 else None if a is None or b is None else 1


def _not(a: Value) -> Value:
    return None if a is None else 1 - a


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "smov": lambda a: a,
    "pmov": lambda a: a,
    "sadd": lambda a, b: a + b & _MASK,
    "ssub": lambda a, b: a - b & _MASK,
    "smul": lambda a, b: a * b & _MASK,
    "smulhi": lambda a, b: a * b >> 32,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << b & _MASK if b < 32 else 0,
    "sshrl": lambda a, b: a >> b if b < 32 else 0,
    "sshra": lambda a, b: _signed(a) >> min(b, 31) & _MASK,
    "scalar_lea": lambda a, b=0: a + b & _MASK,
    "scalar_select": lambda p, a, b: None if p is None else a if p else b,
    "pand": _and,
    "pnand": lambda a, b: _not(_and(a, b)),
    "por": lambda a, b: _not(_and(_not(a), _not(b))),
    "pnor": lambda a, b: _and(_not(a), _not(b)),
    "pxor": lambda a, b: a ^ b,
    "pneg": _not,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a - b == 0,
    "ne": lambda a, b: a - b != 0,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _function(op: str) -> Callable[..., Value] | None:
    """The function of a scalar instruction; None for an unknown one."""
    name, *rest = op.split(".")
    if name == "scmp" and rest[1].startswith("f"):
        return lambda a, b: None  # noqa: ARG005 floats are unknown
    if name in ("smin", "smax"):
        pick = min if name == "smin" else max
        return lambda a, b: pick(a, b, key=_signed if rest[0] == "s32" else None)
    if name == "scmp":
        compare, signed = _COMPARE[rest[0]], rest[1] == "s32"
        return lambda a, b: int(compare(_signed(a), _signed(b)) if signed else compare(a, b))
    return _FUNCTIONS.get(name)
