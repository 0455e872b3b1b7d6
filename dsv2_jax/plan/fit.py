"""Finds what fits a topology, by compiling: layouts, smaller settings, decode rows and the phases of GRPO."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from dsv2_jax import parameters
from dsv2_jax.alignment import sampler, verifiers
from dsv2_jax.config import Config, Mesh, check
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.ops import switch
from dsv2_jax.parallel.mesh import BATCH, CONTEXT, EXPERT, STORAGE, TENSOR
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import Estimate, Planner, model_flops
from dsv2_jax.plan.program import Work

_COMPILED = 4  # candidates that a search compiles
_EFFICIENCY = 0.55  # assumed fraction of the MXU's peak; equal for all candidates, it only sets the weight of traffic
_STORED = {"full": 1, "attention": 3}  # [tokens, d] arrays that a layer stores, approximately
_DOUBLINGS = 2  # how often `suggest` doubles the number of chips
_ROW_STEP = 8  # rows per device are a multiple of it
_CLOSE = 0.03  # `max_rows` stops if the free memory is enough for less than this fraction of additional rows
_ATTEMPTS = 5  # maximum number of programs that `max_rows` compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """A layout's cost by arithmetic, before it is compiled."""

    config: Config
    compute: float  # seconds
    traffic: float  # seconds on the links, without overlap
    memory: float  # bytes of a device

    @property
    def step(self) -> float:
        """Seconds of a step: compute and a third of the traffic, assumed to be exposed; at least all of the traffic."""
        return max(self.compute + self.traffic / 3, self.traffic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """HBM of a device during a phase of a GRPO iteration, in bytes."""

    name: str
    program: int  # the compiler's peak of the phase's program
    resident: dict[str, int]  # arrays that the device holds outside the program

    @property
    def peak(self) -> int:
        """The sum of the program and the resident arrays."""
        return self.program + sum(self.resident.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoIteration:
    """An iteration of GRPO on a topology. size: a device's bytes of HBM."""

    size: int
    phases: tuple[Phase, ...]
    preparing: Estimate  # the conversion of the parameters to the sampler's weights
    sampling: Estimate  # a step of the sampler with all sequences at their maximum length
    updating: Estimate  # an optimizer step

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        programs = all(e.fits for e in (self.preparing, self.sampling, self.updating))
        return programs and max(phase.peak for phase in self.phases) <= self.size


def search(config: Config, topology: Topology, plan: Planner) -> list[Estimate]:
    """Compiles the layouts that are fastest by arithmetic. Those that fit come first, sorted by step time.

    Raises ValueError if no mesh of the topology suits the config.
    """
    check(config.mesh.slices == 1, "--search supports one slice: leave mesh.slices 1")
    guesses = [guess(candidate, topology) for candidate in candidates(config, topology)]
    check(bool(guesses), f"no mesh of {topology.name} suits this model and batch")
    fitting = [g for g in guesses if g.memory < topology.chip.hbm_size] or guesses
    fastest = sorted(fitting, key=lambda g: g.step)[:_COMPILED]
    results = [plan(g.config, topology, "step") for g in fastest]
    return sorted(results, key=lambda e: (not e.fits, e.time.step if e.time else e.memory.peak))


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """All valid meshes with powers of two for fsdp, expert, context and tensor, each with both remat policies."""
    sizes = [2**i for i in range(topology.devices.bit_length())]
    for expert, context, tensor in itertools.product(sizes, repeat=3):
        fsdp = topology.devices // (expert * context * tensor)
        if fsdp * expert * context * tensor != topology.devices:
            continue
        for remat in _STORED:
            mesh = Mesh(fsdp=fsdp, expert=expert, context=context, tensor=tensor)
            compute = dataclasses.replace(config.compute, remat=remat)
            candidate = dataclasses.replace(config, mesh=mesh, compute=compute)
            try:
                laid_out(candidate, topology)
            except ValueError:
                continue
            yield candidate


def guess(config: Config, topology: Topology) -> Guess:
    """Estimates a layout by arithmetic: FLOPs, weights and tokens on the links, state and stored activations."""
    model, mesh, chip = config.model, config.mesh, topology.chip
    moe, width = model.moe, model.hidden_size
    micro_size = config.batch.micro_size or config.batch.size
    tokens = micro_size // mesh.size(*BATCH) * config.batch.length // mesh.size(*CONTEXT)  # of a device
    micro_batches = config.batch.size // micro_size
    total = parameters.count(model)
    experts = model.moe_layers * 3 * moe.n_routed_experts * width * moe.moe_intermediate_size
    groups, tensor = mesh.size(*EXPERT), mesh.size(*TENSOR)
    gathered = (experts / groups + total - experts) / tensor * (1 - 1 / max(1, mesh.size(*STORAGE)))
    copies = min(groups - 1, moe.topk_group if groups > moe.num_experts_per_tok else groups - 1)
    dispatched = 5 * model.moe_layers * copies * tokens * width if groups > 1 else 0
    reduced = 6 * 2 * model.num_hidden_layers * tokens * width if tensor > 1 else 0
    recompute = 4 / 3 if config.compute.remat == "full" else 7 / 6
    flops = model_flops(model, config.batch.length) * tokens / tensor * recompute
    stored = _STORED[config.compute.remat] * model.num_hidden_layers * tokens * width * 2
    return Guess(
        config=config,
        compute=micro_batches * flops / (chip.peak * chip.cores * _EFFICIENCY),
        traffic=micro_batches * 2 * (3 * gathered + dispatched + reduced) / (chip.links / 2 * chip.link),
        memory=16 * total / topology.devices + stored + 4 * gathered / max(1, model.num_hidden_layers),
    )


def suggest(config: Config, topology: Topology, plan: Planner, work: Work = "step") -> str:
    """A sentence with the smallest change that makes the program fit, or with the changes that do not suffice."""
    tried = []
    for flags, changed, chips, changed_work in _changes(config, topology, work):
        try:
            result = plan(changed, chips, changed_work)
        except ValueError:  # the config does not suit these devices
            continue
        m = result.memory
        if result.fits:
            return f"it fits with {flags}: {m.peak / 2**30:.2f} GiB" + (
                f" (not with {', '.join(tried)})" if tried else ""
            )
        tried.append(f"{flags}, {m.peak / 2**30:.2f} GiB")
    return "no change that was tried fits" + (f": {'; '.join(tried)}" if tried else "")


def _changes(config: Config, topology: Topology, work: Work) -> Iterator[tuple[str, Config, Topology, Work]]:
    """Smaller variants in the order of preference: (flags, config, topology, work)."""
    if isinstance(work, Capacity):
        while work.rows > 1:
            pages = max(work.pages // 2, -(-work.length // work.page) + 1)
            work = dataclasses.replace(work, rows=work.rows // 2, pages=pages)
            yield f"--capacity.rows {work.rows}", config, topology, work
        return
    remat = ""
    if config.compute.remat != "full":
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="full"))
        remat = "--compute.remat full"
        yield remat, config, topology, work
    mesh = config.mesh.resolve(topology.devices * config.mesh.slices)
    replicas, micro_size = mesh.size(*BATCH), config.batch.micro_size or config.batch.size
    while micro_size % 2 == 0 and (micro_size // 2) % replicas == 0:
        micro_size //= 2
        moe = config.model.moe
        if moe.budget_sequences and micro_size % moe.budget_sequences:
            break
        batch = dataclasses.replace(config.batch, micro_size=micro_size)
        smaller = dataclasses.replace(config, batch=batch)
        yield " ".join(filter(None, (remat, f"--batch.micro_size {micro_size}"))), smaller, topology, work
    for _ in range(_DOUBLINGS):
        topology = doubled(topology)
        wider = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=-1))
        yield " ".join(filter(None, (remat, f"--topology {topology.name} --mesh.fsdp -1"))), wider, topology, work


def doubled(topology: Topology) -> Topology:
    """The topology with its smallest dimension doubled."""
    shape = list(topology.shape)
    shape[shape.index(min(shape))] *= 2
    return Topology(f"{topology.name.split(':')[0]}:{'x'.join(map(str, sorted(shape)))}")


def max_rows(config: Config, topology: Topology, capacity: Capacity, plan: Planner) -> tuple[Capacity, Estimate]:
    """The capacity with the maximum number of rows of `capacity.length` tokens that fit, and its step's estimate.

    Starts at `capacity.rows` and corrects by the memory that is left or missing. Raises ValueError if no number of rows
    that was tried fits.
    """
    implementation = switch.implementation(config.compute, topology.kind)
    best, rows = None, capacity.rows
    fitting, failing = 0, 0  # the highest number of rows known to fit, the lowest known not to fit (0: none)
    for _ in range(_ATTEMPTS):
        tried = dataclasses.replace(capacity, rows=rows, pages=0).resolve(config.model, implementation)
        e = plan(config, topology, tried)
        m = e.memory
        row_bytes = (m.cache + max(m.activations, 0)) / rows
        if e.fits:
            best, fitting = (tried, e), rows
        else:
            failing = rows
        more = (m.size - m.peak) / row_bytes
        if e.fits and more < _CLOSE * rows:
            break
        limit = tried.most_rows(-(-tried.length // tried.page), config.model, implementation)
        wanted = min(int(rows + more), limit) // _ROW_STEP * _ROW_STEP
        if failing and not fitting < wanted < failing:  # memory is not exactly proportional to rows: bisect instead
            wanted = (fitting + failing) // 2 // _ROW_STEP * _ROW_STEP
        if wanted <= fitting:
            break
        rows = wanted
    check(best is not None, f"{_ROW_STEP} sequences of {capacity.length} tokens per device do not fit")
    assert best is not None
    return best


def grpo_iteration(config: Config, topology: Topology, plan: Planner) -> GrpoIteration:
    """Estimates a GRPO iteration: compiles its three programs, and counts the arrays that a device holds besides them.

    A device always holds the parameters, the reference (float32, sharded as the parameters), the reward models and the
    sampler's cache. While weights are prepared and responses sampled, it also holds the sampler's weights and, unless
    `grpo.offload` is on, the optimizer state. The update frees the sampler's weights. Reward models count as large as
    the policy. Log-probabilities and reward scores are not compiled: they are forward passes of the update's
    micro-batches, without gradients. Raises ValueError as `plan` does.
    """
    mesh = config.mesh.resolve(topology.devices * config.mesh.slices)
    resolved = dataclasses.replace(config, mesh=mesh)
    implementation = switch.implementation(config.compute, topology.kind)
    capacity = sampler.capacity(resolved, implementation).resolve(config.model, implementation)
    preparing, sampling, updating = (plan(config, topology, work) for work in ("weights", capacity, "step"))
    masters, optimizer, cache = updating.memory.parameters, updating.memory.optimizer, sampling.memory.cache
    reward_models = sum(name not in verifiers.REWARDS for name in config.grpo.rewards) * masters
    always = {"reference": masters, "reward models": reward_models}
    waiting = {"optimizer": 0 if config.grpo.offload else optimizer}
    phases = (
        Phase(name="preparing weights", program=preparing.memory.peak, resident=always | waiting | {"cache": cache}),
        Phase(name="sampling", program=sampling.memory.peak, resident=always | waiting | {"masters": masters}),
        Phase(name="updating", program=updating.memory.peak, resident=always | {"cache": cache}),
    )
    size = updating.memory.size
    return GrpoIteration(size=size, phases=phases, preparing=preparing, sampling=sampling, updating=updating)


def figures(iteration: GrpoIteration) -> dict[str, Any]:
    """The iteration as JSON values."""
    phases = [dataclasses.asdict(phase) | {"peak": phase.peak} for phase in iteration.phases]
    return dataclasses.asdict(iteration) | {"phases": phases, "fits": iteration.fits}
