"""What the Pallas kernels of a program cost: the compiler estimates none of them."""

import dataclasses
import re
from collections.abc import Iterator

from dsv2_jax.plan import hlo, timeline
from pallas_kernels.chips import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """All calls of one kernel in a step, on one device."""

    name: str
    count: int
    seconds: float  # of all calls
    flops: float  # that the kernel declares, of one call
    at_peak: float  # seconds of all calls at the MXU's peak


class Prices:
    """Seconds of kernel calls on a chip."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        self._instructions: dict[tuple[str, str], hlo.Instruction] = {}

    def seconds(self, instruction: hlo.Instruction, where: hlo.Computation) -> float:
        """Of one call: its declared FLOPs at the peak, or its bytes at the HBM's bandwidth, whichever is longer."""
        self._instructions[where.name, instruction.name] = instruction
        flops, moved = declared(instruction)
        cores = self._chip.cores
        return max(flops / (self._chip.peak * cores), moved / (self._chip.hbm * cores))

    def at_peak(self, played: timeline.Timeline) -> float:
        """Seconds of all calls of a program if the MXUs never paused."""
        return sum(call.at_peak for call in self.calls(played))

    def calls(self, played: timeline.Timeline) -> Iterator[Call]:
        """Every kernel of a program."""
        for key, instruction in self._instructions.items():
            use, (flops, _) = played.uses[key], declared(instruction)
            yield Call(
                name=instruction.name,
                count=use.count,
                seconds=use.core,
                flops=flops,
                at_peak=use.count * flops / (self._chip.peak * self._chip.cores),
            )


def declared(instruction: hlo.Instruction) -> tuple[float, float]:
    """(FLOPs, bytes) that a kernel's author says a call takes."""
    found = re.search(
        r'cost_estimate\\?":\s*\{[^}]*?flops\\?":\s*\\?"?(\d+)[^}]*?bytes_accessed\\?":\s*\\?"?(\d+)',
        instruction.attributes,
    )
    return (float(found[1]), float(found[2])) if found else (0.0, 0.0)
