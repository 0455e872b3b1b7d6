"""A price for what the compiler gives no estimate of: gathers, scatters and sorts above all.

Rough, and kinder than a chip: what moves goes through the HBM at its full bandwidth, however short the rows; a sort is
a bitonic network on the vector unit.
"""

import math

from dsv2_jax.plan.hlo import Computation, Instruction, Module, arrays, size
from pallas_kernels.chips import Chip

_FREE = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding")
_LANES = 1024  # numbers that the vector unit compares and exchanges in one cycle, over _SWAP
_SWAP = 4  # cycles of one step: two selects, a compare, a move


def seconds(instruction: Instruction, where: Computation, module: Module, chip: Chip) -> float:
    """One execution of an instruction that has no `estimated_cycles`."""
    if instruction.op == "custom-call" and any(f'"{name}"' in instruction.attributes for name in _FREE):
        return 0.0
    if instruction.op == "sort":
        return _sort_cycles(instruction) / chip.clock / chip.cores
    return _moved(instruction, where, module) / (chip.hbm * chip.cores)


def _sort_cycles(instruction: Instruction) -> float:
    operands = arrays(instruction.shape)
    dims = operands[0][1]
    along = int((instruction.attribute("dimensions") or "0").split(",")[0])
    stages = math.ceil(math.log2(max(2, dims[along])))
    return stages * (stages + 1) / 2 * math.prod(dims) * len(operands) * _SWAP / _LANES


def _moved(instruction: Instruction, where: Computation, module: Module) -> float:
    """Bytes read and written."""
    if instruction.op == "fusion":
        inside = module.computations[instruction.attribute("calls") or ""]
        for one in inside.instructions:
            if one.op == "scatter":
                return 3 * size(inside.by_name[one.operands[-1]].shape)  # updates, and what they are added to
            if one.op == "dynamic-update-slice":
                return 2 * size(inside.by_name[one.operands[1]].shape)
        return 2 * size(instruction.shape)
    if instruction.op in ("scatter", "dynamic-update-slice"):
        update = instruction.operands[-1 if instruction.op == "scatter" else 1]
        return 3 * size(where.by_name[update].shape)
    return 2 * size(instruction.shape)
