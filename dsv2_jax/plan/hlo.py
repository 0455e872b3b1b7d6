"""Parses a compiled, scheduled HLO module: instructions in schedule order, shapes and loop trip counts.

The input is the text that the compiler dumps. The parser reads only the parts that the time model needs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "token": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_NO_ESTIMATE = 2**62  # the compiler writes 2^63 - 1 for an instruction without an estimate
_MAX_ITERATIONS = 10**6
# Functions in these files are called from many places, so a line in them does not identify an operation.
_HELPERS = tuple(
    f"dsv2_jax/{name}.py"
    for name in ("parallel/collectives", "parallel/sharding", "ops/matmul", "ops/cpu/matmul", "model/layers")
)
COLLECTIVES = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_UNCHANGED_VALUE = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "optimization-barrier",
    "bitcast-convert",
)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (dtype, dims) of every array in a shape, which may be a tuple."""
    return [
        (dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(shape)
        if dtype in _BITS
    ]


def size(shape: str) -> int:
    """Bytes of all arrays in a shape, without layout padding."""
    return sum(_BITS[dtype] * math.prod(dims) // 8 for dtype, dims in arrays(shape))


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of HLO: `name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The value of `key=value` without a leading %; None if the key is absent."""
        found = re.search(rf"\b{key}=\{{?%?([^\s,{{}}()]+)", self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution; None if it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else None

    @property
    def kind(self) -> str:
        """The operation without the suffix -start, -update or -done."""
        return re.sub(r"-(start|done|update)$", "", self.op)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A sequence of instructions in schedule order."""

    name: str
    instructions: tuple[HloInstruction, ...]
    root: str

    @functools.cached_property
    def by_name(self) -> dict[str, HloInstruction]:
        """Maps names to instructions."""
        return {i.name: i for i in self.instructions}


@dataclasses.dataclass(frozen=True)
class Module:
    """The program that each device runs."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int
    sources: Mapping[int, str]  # stack frame -> `file.py:line`, the innermost line in this project

    def source(self, instruction: HloInstruction) -> str:
        """The source line that produced the instruction; `?` if the compiler names none."""
        frame = instruction.attribute("stack_frame_id")
        return self.sources.get(int(frame), "?") if frame else "?"


def parse(text: str) -> Module:
    """Parses the compiler's text. Raises ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.split("\n"):
        if not name:
            found = _COMPUTATION.match(line)
            if found:
                name, lines = found[2], []
                entry = name if found[1] else entry
        elif line.startswith("}"):
            computations[name] = _computation(name, lines)
            name = ""
        elif _HEAD.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += " " + line.strip()
    if not entry:
        raise ValueError("not an HLO module: the text has no entry computation")
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")]))
    return Module(computations, entry, devices, _sources(text))


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = [], ""
    for line in lines:
        found = _HEAD.match(line)
        assert found
        instructions.append(_instruction(line, found[2], found.end()))
        root = found[2] if found[1] else root
    return Computation(name, tuple(instructions), root)


def _instruction(line: str, name: str, start: int) -> HloInstruction:
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    literal = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing - 1])
    return HloInstruction(
        name=name,
        shape=line[start:end],
        op=line[end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal.strip(),
        attributes=line[closing:],
    )


def _closing(line: str, opening: int) -> int:
    """The position after the parenthesis that closes the one at `opening`. Ignores parentheses in strings."""
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(line, opening):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return len(line)


def _sources(text: str) -> dict[int, str]:
    """Reads `Module.sources` from the tables at the head of a module."""

    def table(title: str, row: str) -> Iterator[re.Match]:
        found = re.search(rf"^{title}\n((?:\d.*\n)+)", text, re.MULTILINE)
        return re.finditer(row, found[1], re.MULTILINE) if found else iter(())

    files = {row[1]: row[2] for row in table("FileNames", r'^(\d+) "(.*)"$')}
    lines = {
        row[1]: _own(files.get(row[2], ""), row[3])
        for row in table("FileLocations", r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
    }
    # The printed parent of a frame is one too high: a frame that names itself has no parent.
    frames = {
        int(row[1]): (lines.get(row[2], ""), int(row[3]) - 1)
        for row in table("StackFrames", r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    }
    found: dict[int, str] = {}
    for frame in sorted(frames):
        line, parent = frames[frame]
        found[frame] = line or found.get(parent, "?")
    return found


def _own(file: str, line: str) -> str:
    """`file.py:line` for a file of this project that is not in `_HELPERS`; else an empty string."""
    place = re.search(r"(?:dsv2_jax|pallas_kernels)/[\w/]+\.py$", file)
    if not place or "site-packages" in file or place[0] in _HELPERS:
        return ""
    return f"{place[0]}:{line}"


def is_kernel(instruction: HloInstruction) -> bool:
    """Whether the instruction calls a Pallas kernel."""
    return instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


class TripCounts:
    """Trip counts of while loops, from initial values, the increment of one iteration and the condition."""

    def __init__(self, module: Module) -> None:
        self._computations = module.computations
        self.unknown: list[str] = []  # loops whose trip count depends on data

    def count(self, loop: HloInstruction, where: Computation, known: Mapping[int, int]) -> tuple[int, dict[int, int]]:
        """Returns (trip count, integers of the loop state that stay constant, by tuple index).

        The count is 1 if it depends on data; the loop is then added to `unknown`. known: the constant integers of the
        enclosing loop.
        """
        start = where.by_name[loop.operands[0]]
        state = {}
        if start.op == "tuple":
            values = (self._value(where, name, known) for name in start.operands)
            state = {n: value for n, value in enumerate(values) if value is not None}
        condition = self._computations[loop.attribute("condition") or ""]
        body = self._computations[loop.attribute("body") or ""]
        root = body.by_name[body.root]

        def advance(state: Mapping[int, int]) -> dict[int, int]:
            if root.op != "tuple":
                return {}
            values = {n: self._value(body, root.operands[n], state) for n in state}
            return {n: value for n, value in values.items() if value is not None}

        second = advance(state)
        steps = {n: value - state[n] for n, value in second.items()}
        third = advance(second)
        steady = {n: step for n, step in steps.items() if third.get(n) == second[n] + step}
        constant = {n: state[n] for n, step in steady.items() if step == 0}
        state = {n: state[n] for n in steady}
        for count in range(_MAX_ITERATIONS):
            continues = self._value(condition, condition.root, state)
            if continues is None:
                break
            if not continues:
                return count, constant
            state = {n: value + steady[n] for n, value in state.items()}
        self.unknown.append(loop.name)
        return 1, constant

    def _value(self, where: Computation, name: str, known: Mapping[int, int], given: tuple = ()) -> int | None:
        """Evaluates an integer instruction; None if its value is not known.

        known: integers of the loop state by tuple index. given: inside a fusion, the values of its parameters.
        """
        instruction = where.by_name.get(name)
        if instruction is None:
            return None
        op, operands = instruction.op, instruction.operands
        if op == "constant":
            text = {"true": "1", "false": "0"}.get(instruction.literal, instruction.literal)
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if op == "parameter":
            return given[int(instruction.literal)] if given else None
        if op == "get-tuple-element":
            source, index = where.by_name.get(operands[0]), int(instruction.attribute("index") or 0)
            if source is not None and source.op == "parameter" and not given:
                return known.get(index)
            if source is not None and source.op == "tuple":
                return self._value(where, source.operands[index], known, given)
            if source is not None and source.op == "fusion":
                return self._fused(where, source, known, given, index)
            return None
        if op == "fusion":
            return self._fused(where, instruction, known, given, None)
        if op in _UNCHANGED_VALUE:
            return self._value(where, operands[0], known, given)
        if op not in _ARITHMETIC:
            return None
        values = [self._value(where, operand, known, given) for operand in operands]
        if any(value is None for value in values):
            return None
        return _ARITHMETIC[op](instruction, *values)

    def _fused(
        self, where: Computation, fusion: HloInstruction, known: Mapping[int, int], given: tuple, index: int | None
    ) -> int | None:
        called = self._computations.get(fusion.attribute("calls") or "")
        if called is None or len(called.instructions) > 40:  # loop counters are computed by small fusions
            return None
        values = tuple(self._value(where, operand, known, given) for operand in fusion.operands)
        root = called.by_name[called.root]
        name = root.operands[index] if index is not None and root.op == "tuple" else called.root
        return self._value(called, name, {}, values or (None,))


def _compare(instruction: HloInstruction, a: int, b: int) -> int:
    match instruction.attribute("direction"):
        case "LT":
            return int(a < b)
        case "LE":
            return int(a <= b)
        case "GT":
            return int(a > b)
        case "GE":
            return int(a >= b)
        case "EQ":
            return int(a == b)
        case _:
            return int(a != b)


_ARITHMETIC: dict[str, Any] = {
    "add": lambda _, a, b: a + b,
    "subtract": lambda _, a, b: a - b,
    "multiply": lambda _, a, b: a * b,
    "minimum": lambda _, a, b: min(a, b),
    "maximum": lambda _, a, b: max(a, b),
    "negate": lambda _, a: -a,
    "select": lambda _, p, a, b: a if p else b,
    "and": lambda _, a, b: a & b,
    "compare": _compare,
}
