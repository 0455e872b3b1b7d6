"""Reads the TPU compiler's final VLIW bundles of a kernel, and estimates the time of a straight run of them."""

import collections
import dataclasses
import re
from collections.abc import Sequence

from pallas_kernels.chips import Chip

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2}[: ]*)*:\s*(?:>\s*)*\{", re.M)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_DIRECTION = re.compile(r"/\* (\w+)-to-(\w+) \*/")
_INSTRUCTION = re.compile(r"(?:(?P<target>%\S+) = )?(?P<op>[a-z_][\w.\[\]]*)\s*(?P<rest>.*)")
_GUARD = re.compile(r"\((!?%\w+_p\d+)(?:, ([^)]*))?\),?\s*")
_TAG = re.compile(r"\[(?:resolvable|thread):\$\w+\]\s*")

CORE_ID = " @core"  # marks the instruction that reads the core's number
_XLU_INTERVAL, _XLU_LATENCY = 4, 69  # cycles of the cross-lane unit, from the compiler's schedules
_MATMULS_QUEUED = 4  # matmuls that an MXU queues before the core has to wait


@dataclasses.dataclass(frozen=True, slots=True)
class BundleInstruction:
    """`target = op (guard, kept), operands`. If the guard is false, the target becomes `kept`, or nothing happens."""

    op: str
    target: str
    guard: str
    kept: str
    operands: tuple[str, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class KernelProgram:
    """Bundles by address, and the first bundle of each region, which is a branch's target."""

    bundles: tuple[tuple[BundleInstruction, ...], ...]
    regions: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """One execution of a straight run of bundles."""

    starts: tuple[int, ...]  # cycle of each bundle
    cycles: int
    matmuls: int  # matmul instructions
    mxu_cycles: float  # cycles in which the MXUs are busy, on average
    spills: int  # vector registers spilled to memory
    fills: int  # and read back


def parse(text: str) -> KernelProgram:
    """Reads a `final_bundles` dump."""
    heads = list(_BUNDLE.finditer(text))
    bundles, regions = [], {}
    for i, head in enumerate(heads):
        body = text[head.end() : heads[i + 1].start() if i + 1 < len(heads) else len(text)]
        regions |= dict.fromkeys(_REGION.findall(body), i)
        body = _COMMENT.sub(_note, body)
        bundles.append(tuple(filter(None, map(_instruction, body.split(";;")))))
    return KernelProgram(tuple(bundles), regions)


def _note(comment: re.Match) -> str:
    """A mark for the parser in place of a comment: the core's number is read, or the direction of a copy."""
    if "megacore core id" in comment[0]:
        return CORE_ID
    direction = _DIRECTION.fullmatch(comment[0])
    return f" @{direction[1]}_to_{direction[2]}" if direction else " "


def _instruction(text: str) -> BundleInstruction | None:
    text = " ".join(text.split()).rstrip("} ")
    match = _INSTRUCTION.match(text)
    if not match:
        return None
    rest = _TAG.sub("", match["rest"])
    guard = _GUARD.search(rest)
    if guard:
        rest = rest.replace(guard[0], "", 1)
    rest, _, direction = rest.partition(" @")
    op = f"dma.{direction}" if match["op"] == "dma.general" and direction else match["op"]
    operands = tuple(x.strip() for x in rest.split(",") if x.strip())
    held, kept = (guard[1], guard[2] or "") if guard else ("", "")
    return BundleInstruction(op, match["target"] or "", held, kept, operands, text)


def schedule(bundles: Sequence[Sequence[BundleInstruction]], chip: Chip) -> Schedule:
    """Times a straight run: a cycle for each bundle, explicit delays, and waits for matrix and cross-lane units.

    Does not include bank conflicts, or other stalls that the compiler did not expect.
    """
    now, starts, count = 0.0, [], collections.Counter()
    mxus: dict[str, _Unit] = collections.defaultdict(_Unit)
    xlus: dict[str, _Unit] = collections.defaultdict(_Unit)
    for bundle in bundles:
        now += 1
        for i in bundle:
            unit = re.search(r"\.(mxu|xlu)(\d)", i.text)
            if unit and i.op.startswith("vpop"):
                slot = re.search(r"mrb\[(\d+)\]", i.text)
                now = (mxus if unit[1] == "mxu" else xlus)[unit[2]].pop(now, slot and int(slot[1]) // 4)
            elif i.op.startswith("vmatmul"):
                now = _matmul(i, mxus[unit[2] if unit else "0"], now, chip)
                count["matmuls"] += 1
            elif unit and unit[1] == "xlu":
                _across_lanes(i, xlus[unit[2]], now)
            elif i.op in ("vdelay", "sdelay", "delay"):
                now += int(i.operands[-1])
            elif i.op.startswith(("vld", "vst")) and "spill" in i.text:
                count["fills" if i.op.startswith("vld") else "spills"] += 1
        starts.append(round(now))
    busy = [unit.worked for unit in mxus.values()]
    return Schedule(
        starts=tuple(starts),
        cycles=round(max([now, *busy])),
        matmuls=count["matmuls"],
        mxu_cycles=sum(busy) / chip.mxus,
        spills=count["spills"],
        fills=count["fills"],
    )


class _Unit:
    """A unit with a queue: the cycle at which it is free again, and the cycle at which each result is ready."""

    def __init__(self) -> None:
        self.free = self.worked = 0.0
        self.queue: collections.deque[float] = collections.deque()
        self.slots: dict[int, float] = {}

    def start(self, now: float, cycles: float) -> float:
        """Queues work of `cycles` cycles; returns the cycle at which it begins."""
        begin = max(now, self.free)
        self.free = begin + cycles
        self.worked += cycles
        return begin

    def pop(self, now: float, slot: int | None) -> float:
        """The cycle at which the next result is popped, or that in a slot of the result buffer."""
        if slot is not None:
            return max(now, self.slots.get(slot, now))
        return max(now, self.queue.popleft()) if self.queue else now


def _matmul(i: BundleInstruction, mxu: _Unit, now: float, chip: Chip) -> float:
    cycles = chip.matmul_cycles
    if not re.search(r"bf16|u8|s8|f8|s4|u4|e4m3|e5m2", i.op):
        cycles //= 2  # 8 rows of 32 bits, not 16 of 16
    now = max(now, mxu.free - _MATMULS_QUEUED * cycles)
    begin = mxu.start(now, cycles)
    slot = re.search(r"mrb\[(\d+)\]", i.text)
    if slot:
        mxu.slots[int(slot[1]) // 4] = begin + cycles + chip.matmul_latency
    else:
        results = 2 * chip.mxu_width // 128
        mxu.queue.extend(begin + chip.matmul_latency + cycles * (n + 1) / results for n in range(results))
    return now


def _across_lanes(i: BundleInstruction, xlu: _Unit, now: float) -> None:
    ready = xlu.start(now, _XLU_INTERVAL) + _XLU_LATENCY
    if "xpose" not in i.op:
        xlu.queue.append(ready)
    elif ".end" in i.op:  # the last step "[8/8]" of a transpose of 8 registers gives 8 results, one each interval
        steps = re.search(r"\[\d+/(\d+)\]", i.text)
        xlu.queue.extend(ready + n * _XLU_INTERVAL for n in range(int(steps[1]) if steps else 8))
