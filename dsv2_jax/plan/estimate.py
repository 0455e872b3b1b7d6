"""Estimates the cost of a compiled program: memory, time, traffic and its costliest operations."""

import dataclasses
import re
from collections.abc import Callable

from dsv2_jax.config import Config, Model
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.parallel.mesh import BATCH, CONTEXT
from dsv2_jax.plan import hlo, timeline
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.kernels import KernelCalls, KernelTimes
from dsv2_jax.plan.network import Torus, collective_of
from dsv2_jax.plan.program import CompiledProgram, Work
from dsv2_jax.training.metrics import flops_per_token as training_flops_per_token

_COSTLIEST = 10  # operations in a report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM of one device, at the program's peak."""

    size: int
    peak: int
    parameters: int
    optimizer: int
    batch: int
    cache: int  # the KV cache of a decode step
    gradients: int
    activations: int  # and all other temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one device, of one kind and over the same axes of the torus."""

    kind: str
    axes: str  # "x y"
    count: int
    wire: float  # bytes that the device sends
    busy: float  # seconds during which links are in use
    exposed: float  # seconds during which the core waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """The operations of one kind at one source line. seconds: of the core. exposed: the part spent waiting."""

    source: str
    what: str
    count: int
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of one execution on one device, estimated from the compiler's schedule and not measured.

    `step` is the sum of the next five.
    """

    step: float
    xla: float  # XLA operations with an estimate by the compiler
    unestimated: float  # XLA operations without one
    kernels: float  # Pallas kernels
    exposed: float  # waits for other devices
    copies: float  # waits for copies between HBM and VMEM
    at_peak: float  # `xla` plus the kernels' FLOPs at the MXU's peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a config's program on a topology: a training step, a forward pass or a decode step."""

    topology: str
    chips: int
    devices: int
    work: str  # "step", "forward", "weights" or "decode"
    mesh: dict[str, int]
    remat: str
    sequences: int
    micro_batches: int
    length: int  # tokens of a sequence; in a decode step, those in the cache
    weights: str  # the weights' format in a decode step: "int8", "float8" or "compute"
    dropping: bool
    fits: bool
    memory: Memory
    time: Time | None = None  # None if the program does not fit
    flops_per_token: float
    tokens_per_second_per_chip: float = 0.0
    mfu: float = 0.0
    wire: float = 0.0  # bytes that a device sends
    traffic: tuple[Traffic, ...] = ()
    costliest: tuple[Operation, ...] = ()
    kernels: tuple[KernelCalls, ...] = ()
    loops: tuple[timeline.Loop, ...] = ()  # those over the layers, forward and backward
    caveats: tuple[str, ...] = ()
    compile_seconds: float
    compile_bytes: int


Planner = Callable[[Config, Topology, Work], Estimate]  # compiles a program and estimates its cost


def model_flops(model: Model, length: int, work: str = "step") -> float:
    """Model FLOPs per token of a sequence of `length`, by the convention of `training.metrics.flops_per_token`.

    A forward pass has a third of the FLOPs of training. A decoded token attends to all `length` tokens, a token of a
    causal pass to half of them on average, so decoding counts as a forward pass over twice the length.
    Attention counts heads with their own keys and values, not the absorbed form.
    """
    if work == "step":
        return training_flops_per_token(model, length)
    return training_flops_per_token(model, 2 * length if work == "decode" else length) / 3


def estimate(
    config: Config,
    topology: Topology,
    program: CompiledProgram,
    text: str,
    say: Callable[[str], None] = lambda _: None,
    work: Work = "step",
) -> Estimate:
    """Estimates a compiled program.

    config: the result of `compile.laid_out`. text: the program's HLO, "" if it does not fit. say: logs progress. work:
    the kind of program.
    """
    chip, batch, mesh = topology.chip, config.batch, config.mesh
    slices, micro_size = mesh.slices, batch.micro_size or batch.size
    name = work if isinstance(work, str) else "decode"
    known = program.parameters + program.optimizer + program.batch + program.cache
    flops_per_token = model_flops(config.model, batch.length, name)
    common: dict = {
        "topology": topology.name,
        "chips": topology.chips * slices,
        "devices": topology.devices * slices,
        "work": name,
        "mesh": mesh.sizes(),
        "remat": config.compute.remat,
        "sequences": batch.size,
        "micro_batches": batch.size // micro_size,
        "length": batch.length,
        "weights": work.weights if isinstance(work, Capacity) else "compute",
        "dropping": bool(
            config.model.moe_layers and config.model.moe.capacity_factor and work == "step" and not config.grpo.group
        ),
        "fits": program.fits,
        "memory": Memory(
            size=program.limit or chip.hbm_size,
            peak=program.used,
            parameters=program.parameters,
            optimizer=program.optimizer,
            batch=program.batch,
            cache=program.cache,
            gradients=program.gradients,
            activations=program.used - known - program.gradients,
        ),
        "flops_per_token": flops_per_token,
        "compile_seconds": program.seconds,
        "compile_bytes": program.host_bytes,
    }
    if not text:
        return Estimate(**common)
    module = hlo.parse(text)
    torus = Torus(chip, program.coords)
    sequences = micro_size // mesh.size(*BATCH)  # of one device
    if isinstance(work, Capacity):
        kernels = KernelTimes(config, topology.kind, say, sequences)
        # In a decode step only loops over pages depend on data: each takes the time to read its pages once from HBM.
        pages = program.cache / config.model.num_hidden_layers / (chip.hbm * chip.cores)
        # Its conditionals select the sampling method. All rows are greedy, which is the fastest branch.
        simulated = timeline.simulate(module, torus, kernels.seconds, unknown_loop_seconds=pages, fastest_branch=True)
        assumption, tokens = f"each takes the time to read its pages from HBM, {pages * 1e3:.3f} ms", batch.size
    else:
        kernels = KernelTimes(config, topology.kind, say, sequences * batch.length // mesh.size(*CONTEXT))
        # With the kernels, only loops over the pairs in excess of a balanced router's depend on data.
        xla = config.compute.kernels == "xla"
        simulated = timeline.simulate(module, torus, kernels.seconds, unknown_loop_seconds=None if xla else 0.0)
        assumption = "one iteration of each is counted" if xla else "they are left out, as under a balanced router"
        tokens = 0 if work == "weights" else batch.size * batch.length
    unknown = ", ".join(simulated.unknown_loops)
    time = _time(module, simulated, kernels)
    return Estimate(
        **common,
        time=time,
        tokens_per_second_per_chip=tokens / time.step / common["chips"],
        mfu=flops_per_token * tokens / (time.step * common["devices"] * chip.peak * chip.cores),
        wire=sum(use.wire for use in simulated.uses.values()),
        traffic=_traffic(module, simulated, torus),
        costliest=_costliest(module, simulated),
        kernels=tuple(kernels.calls(simulated)),
        loops=_layers(config.model, simulated),
        caveats=(f"the trip counts of {unknown} depend on data: {assumption}",) if unknown else (),
    )


def _time(module: hlo.Module, simulated: timeline.Timeline, kernels: KernelTimes) -> Time:
    core = kernel = exposed = copies = unestimated = 0.0
    for (where, name), use in simulated.uses.items():
        instruction = module.computations[where].by_name[name]
        core += use.core
        if hlo.is_kernel(instruction):
            kernel += use.core
        elif instruction.kind == "copy":
            copies += use.exposed
        else:
            exposed += use.exposed
            unestimated += use.core - use.exposed if instruction.cycles is None else 0.0
    xla = core - kernel - exposed - copies - unestimated
    return Time(
        step=simulated.seconds,
        xla=xla,
        unestimated=unestimated,
        kernels=kernel,
        exposed=exposed,
        copies=copies,
        at_peak=xla + kernels.at_peak(simulated),
    )


def _layers(model: Model, simulated: timeline.Timeline) -> tuple[timeline.Loop, ...]:
    """The forward and backward loops over the layers, without events shorter than a thousandth of an iteration."""
    layers = max(model.moe_layers, model.dense_layers)
    loops = sorted((loop for loop in simulated.loops if loop.iterations == layers), key=lambda loop: -loop.seconds)[:2]
    return tuple(
        dataclasses.replace(loop, events=tuple(e for e in loop.events if e.end - e.start > loop.seconds / 1000))
        for loop in sorted(loops, key=lambda loop: loop.seconds)
    )


def _traffic(module: hlo.Module, simulated: timeline.Timeline, torus: Torus) -> tuple[Traffic, ...]:
    by_kind: dict[tuple[str, str], timeline.Use] = {}
    for (where, name), use in simulated.uses.items():
        instruction = module.computations[where].by_name[name]
        collective = collective_of(instruction, module.computations[where], module, torus)
        if collective is None:
            continue
        key = collective.kind, " ".join(torus.axes(collective))
        by_kind.setdefault(key, timeline.Use()).add(use)
    rows = [
        Traffic(kind=kind, axes=axes, count=use.count, wire=use.wire, busy=use.busy, exposed=use.exposed)
        for (kind, axes), use in by_kind.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.wire))


def _costliest(module: hlo.Module, simulated: timeline.Timeline) -> tuple[Operation, ...]:
    """The costliest operations, grouped by source line and kind."""
    lines: dict[tuple[str, str], timeline.Use] = {}
    for (where, name), use in simulated.uses.items():
        instruction = module.computations[where].by_name[name]
        key = module.source(instruction), _description(instruction)
        lines.setdefault(key, timeline.Use()).add(use)
    rows = [
        Operation(source=source, what=what, count=use.count, seconds=use.core, exposed=use.exposed)
        for (source, what), use in lines.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds)[:_COSTLIEST])


def _description(instruction: hlo.HloInstruction) -> str:
    """A short description: the scope, the JAX primitive and, if not forward, the direction."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not found:
        return instruction.kind
    backward = "transpose(" in found[1]
    recomputed = "rematted" in found[1] or "checkpoint" in found[1]
    scope = [part for part in found[1].split("/") if part in ("attention", "ffn", "shared_experts")]
    direction = "recomputed" if recomputed and not backward else "backward" if backward else ""
    return " ".join(part for part in (*scope[-1:], found[1].split("/")[-1], direction) if part)
