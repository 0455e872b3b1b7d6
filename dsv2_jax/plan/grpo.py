"""Whether an iteration of GRPO fits: its programs compiled one by one, and what a device holds beside each, by count.

A device holds at all times the policy's masters, the reference (float32, laid out as the masters), the reward models
and the sampler's cache. While weights are prepared and responses sampled it also holds the sampler's weights, and the
optimizer's state unless `grpo.offload` is on. While updating it holds no weights of the sampler. Not compiled are
log-probabilities and the scores of reward models: forward passes of the update's micro-batches, without its gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from dsv2_jax.alignment import sampler, verifiers
from dsv2_jax.config import Config
from dsv2_jax.ops import switch
from dsv2_jax.plan import report
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.program import Work

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of HBM of a device: the compiler's peak of the phase's program, and what lies beside it."""

    name: str
    program: int
    beside: dict[str, int]

    @property
    def peak(self) -> int:
        """All together."""
        return self.program + sum(self.beside.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """An iteration of GRPO on a topology. size: bytes of HBM of a device."""

    size: int
    phases: tuple[Phase, ...]
    preparing: Estimate  # the sampler's weights made of the masters
    sampling: Estimate  # a step of the engine, every sequence as long as it may be
    updating: Estimate  # an optimizer step

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        alone = all(e.fits for e in (self.preparing, self.sampling, self.updating))
        return alone and max(phase.peak for phase in self.phases) <= self.size


def iteration(config: Config, topology: Topology, plan: Callable[[Config, Topology, Work], Estimate]) -> Iteration:
    """Compiles the update, the sampler's decode step and the preparation of its weights, and adds up each phase.

    Reward models are counted as large as the policy. plan: compiles and estimates. Raises ValueError as it does.
    """
    mesh = config.mesh.resolve(topology.devices * config.mesh.slices)
    resolved = dataclasses.replace(config, mesh=mesh)
    how = switch.implementation(config.compute, topology.kind)
    capacity = sampler.capacity(resolved, how).resolve(config.model, how)
    preparing, sampling, updating = (plan(config, topology, work) for work in ("weights", capacity, "step"))
    masters, optimizer, cache = updating.memory.parameters, updating.memory.optimizer, sampling.memory.cache
    judges = sum(name not in verifiers.REWARDS for name in config.grpo.rewards) * masters
    always = {"reference": masters, "reward models": judges}
    waiting = {"optimizer": 0 if config.grpo.offload else optimizer}
    phases = (
        Phase(name="preparing weights", program=preparing.memory.peak, beside=always | waiting | {"cache": cache}),
        Phase(name="sampling", program=sampling.memory.peak, beside=always | waiting | {"masters": masters}),
        Phase(name="updating", program=updating.memory.peak, beside=always | {"cache": cache}),
    )
    size = updating.memory.size
    return Iteration(size=size, phases=phases, preparing=preparing, sampling=sampling, updating=updating)


def show(found: Iteration) -> str:
    """In lines of text: memory of the phases, then the two programs that have a time."""
    lines = [f"HBM of a device in an iteration of GRPO, GiB of {found.size / _GIB:.0f}"]
    for phase in found.phases:
        beside = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in phase.beside.items() if size)
        lines.append(f"  {phase.name:18}{phase.peak / _GIB:7.2f}: its program {phase.program / _GIB:.2f}, {beside}")
    if found.preparing.time:
        seconds, wire = found.preparing.time.step, found.preparing.wire
        lines.append(f"preparing weights: {seconds:.2f} s, {wire / _GIB:.1f} GiB on the wire of a device")
    parts = (("an optimizer step", found.updating), ("a step of the sampler", found.sampling))
    return "\n".join(lines + [f"\n{name}\n{report.show(estimate)}" for name, estimate in parts])


def figures(found: Iteration) -> dict[str, Any]:
    """For a program."""
    phases = [dataclasses.asdict(phase) | {"peak": phase.peak} for phase in found.phases]
    return dataclasses.asdict(found) | {"phases": phases, "fits": found.fits}
