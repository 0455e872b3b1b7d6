"""The most sequences that an engine can hold on a topology, found by compiling its decode step."""

import dataclasses
from collections.abc import Callable

from dsv2_jax.config import Config, check
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.ops import switch
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.program import Work

_STEP = 8  # rows that a device's number is a multiple of
_CLOSE = 0.03  # of the rows: room for so few more is not worth compiling again
_TRIES = 5


def largest(
    config: Config, topology: Topology, capacity: Capacity, plan: Callable[[Config, Topology, Work], Estimate]
) -> tuple[Capacity, Estimate]:
    """The capacity with as many sequences of `capacity.length` tokens as fit, and its decode step.

    Starts with its rows; then the room that is left is filled, or what is too much taken away. plan: compiles. Raises
    ValueError if not even a few sequences fit.
    """
    how = switch.implementation(config.compute, topology.kind)
    best, rows, lowest, highest = None, capacity.rows, 0, 0  # highest: the fewest rows that do not fit
    for _ in range(_TRIES):
        tried = dataclasses.replace(capacity, rows=rows, pages=0).resolve(config.model, how)
        e = plan(config, topology, tried)
        m = e.memory
        each = (m.cache + max(m.activations, 0)) / rows
        if e.fits:
            best, lowest = (tried, e), rows
        else:
            highest = rows
        more = (m.size - m.peak) / each
        if e.fits and more < _CLOSE * rows:
            break
        most = tried.most_rows(-(-tried.length // tried.page), config.model, how)
        wanted = min(int(rows + more), most) // _STEP * _STEP
        if highest and not lowest < wanted < highest:  # proportion errs: half way between what fits and what does not
            wanted = (lowest + highest) // 2 // _STEP * _STEP
        if wanted <= lowest:
            break
        rows = wanted
    check(best is not None, f"the parameters leave no room for {_STEP} sequences of {capacity.length} tokens a device")
    assert best is not None
    return best
