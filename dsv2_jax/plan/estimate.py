"""What a compiled program costs: memory, time, traffic, its dearest operations, for people and for programs."""

import dataclasses
import re
from collections.abc import Callable

from dsv2_jax import parameters
from dsv2_jax.config import Config, Model
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.parallel.mesh import BATCH
from dsv2_jax.plan import hlo, timeline
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.kernels import Call, Prices
from dsv2_jax.plan.network import Torus
from dsv2_jax.plan.program import Program, Work

_DEAREST = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM of one device, at the program's peak."""

    size: int
    peak: int
    parameters: int
    optimizer: int
    batch: int
    cache: int  # of generation
    gradients: int
    activations: int  # and all else that is temporary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over the same axes of the torus, of one device."""

    kind: str
    axes: str  # of the torus: "x y"
    count: int
    wire: float  # bytes, over a ring or directly
    busy: float  # seconds that links are in use
    exposed: float  # seconds that the core waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """What one line of source costs: seconds of the core."""

    source: str
    what: str
    count: int
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """One step on one device, in seconds: an estimate from the compiler's schedule, not a measurement."""

    step: float
    xla: float  # what the compiler made and estimates
    unpriced: float  # what it made and does not estimate
    kernels: float  # Pallas kernels
    exposed: float  # waiting for other devices
    copies: float  # waiting for copies between HBM and VMEM
    at_peak: float  # XLA's part and the kernels' FLOPs at the MXU's peak, communication left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step of a config on a topology, its forward pass alone, or a decode step of its engine."""

    topology: str
    chips: int
    devices: int
    work: str  # step, forward, weights or decode
    mesh: dict[str, int]
    remat: str
    sequences: int
    micro_batches: int
    length: int  # of a sequence; in a decode step, the tokens it has
    weights: str  # of generation: int8, float8, or as they are computed with
    dropping: bool
    fits: bool
    memory: Memory
    time: Time | None = None  # None: it does not fit
    flops_per_token: float
    tokens_per_second_per_chip: float = 0.0
    mfu: float = 0.0
    wire: float = 0.0  # bytes per device
    traffic: tuple[Traffic, ...] = ()
    dearest: tuple[Operation, ...] = ()
    kernels: tuple[Call, ...] = ()
    loops: tuple[timeline.Loop, ...] = ()  # over the layers, forward and backward
    doubts: tuple[str, ...] = ()
    compile_seconds: float
    compile_bytes: int


def model_flops(model: Model, length: int, work: str = "step") -> float:
    """FLOPs of a token in training: 6 for every activated parameter, and causal attention's products, 3 times forward.

    The convention of the figures that others publish: parameters as `parameters.count_activated` has them (no
    embedding), half of the score matrix, nothing for what is recomputed. A forward pass has a third of them. A token
    that is decoded sees all `length` tokens, and the products counted are those of heads that have their keys.
    """
    a = model.attention
    attention = model.num_hidden_layers * a.num_attention_heads * (a.qk_head_dim + a.v_head_dim) * length
    forward = 2.0 * parameters.count_activated(model) + attention * (2 if work == "decode" else 1)
    return 3 * forward if work == "step" else forward


def estimate(
    config: Config,
    topology: Topology,
    program: Program,
    text: str,
    say: Callable[[str], None] = lambda _: None,
    work: Work = "step",
) -> Estimate:
    """Reads a compiled program. config: as `compile.laid_out` gives it. text: its HLO, "" where it does not fit.

    say: is told which kernels are being priced. work: what the program does.
    """
    chip, batch, mesh = topology.chip, config.batch, config.mesh
    slices, rows = mesh.slices, batch.micro_size or batch.size
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
        "micro_batches": batch.size // rows,
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
    own = rows // mesh.size(*BATCH)  # sequences of a device
    if isinstance(work, Capacity):
        prices = Prices(config, topology.kind, say, own)
        # Only loops over pages depend on data there: charged what a kernel takes that reads each page once.
        pages = program.cache / config.model.num_hidden_layers / (chip.hbm * chip.cores)
        # And its conditions ask what rows are drawn by: all are greedy, which is the cheapest.
        played = timeline.play(module, torus, prices.seconds, unsolved_seconds=pages, cheapest=True)
        doubt, tokens = f"each takes its pages' time in HBM, {pages * 1e3:.3f} ms", batch.size
    else:
        prices = Prices(config, topology.kind, say, own * batch.length // mesh.context)
        # With the kernels only loops over pairs that a balanced router would not send depend on data.
        xla = config.compute.kernels == "xla"
        played = timeline.play(module, torus, prices.seconds, unsolved_seconds=None if xla else 0.0)
        doubt = "counted once" if xla else "none are counted, as of a balanced router"
        tokens = 0 if work == "weights" else batch.size * batch.length
    time = _time(module, played, prices)
    return Estimate(
        **common,
        time=time,
        tokens_per_second_per_chip=tokens / time.step / common["chips"],
        mfu=flops_per_token * tokens / (time.step * common["devices"] * chip.peak * chip.cores),
        wire=sum(use.wire for use in played.uses.values()),
        traffic=_traffic(module, played, torus),
        dearest=_dearest(module, played),
        kernels=tuple(prices.calls(played)),
        loops=_layers(config.model, played),
        doubts=(f"the turns of {', '.join(played.unsolved)} depend on data: {doubt}",) if played.unsolved else (),
    )


def _time(module: hlo.Module, played: timeline.Timeline, prices: Prices) -> Time:
    core = kernel = exposed = copies = unpriced = 0.0
    for (where, name), use in played.uses.items():
        instruction = module.computations[where].by_name[name]
        core += use.core
        if hlo.is_kernel(instruction):
            kernel += use.core
        elif instruction.kind == "copy":
            copies += use.exposed
        else:
            exposed += use.exposed
            unpriced += use.core - use.exposed if instruction.cycles is None else 0.0
    xla = core - kernel - exposed - copies - unpriced
    return Time(
        step=played.seconds,
        xla=xla,
        unpriced=unpriced,
        kernels=kernel,
        exposed=exposed,
        copies=copies,
        at_peak=xla + prices.at_peak(played),
    )


def _layers(model: Model, played: timeline.Timeline) -> tuple[timeline.Loop, ...]:
    """The loops over most of the layers, what is shorter than a thousandth of a turn left out."""
    turns = max(model.moe_layers, model.dense_layers)
    loops = sorted((loop for loop in played.loops if loop.turns == turns), key=lambda loop: -loop.seconds)[:2]
    return tuple(
        dataclasses.replace(loop, events=tuple(e for e in loop.events if e.end - e.start > loop.seconds / 1000))
        for loop in sorted(loops, key=lambda loop: loop.seconds)
    )


def _traffic(module: hlo.Module, played: timeline.Timeline, torus: Torus) -> tuple[Traffic, ...]:
    starts: dict[tuple[str, str], timeline.Use] = {}
    for (where, name), use in played.uses.items():
        instruction = module.computations[where].by_name[name]
        collective = timeline.collective_of(instruction, module.computations[where], module, torus)
        if collective is None:
            continue
        key = collective.kind, " ".join(torus.axes(collective))
        starts.setdefault(key, timeline.Use()).add(use)
    rows = [
        Traffic(kind=kind, axes=axes, count=use.count, wire=use.wire, busy=use.busy, exposed=use.exposed)
        for (kind, axes), use in starts.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.wire))


def _dearest(module: hlo.Module, played: timeline.Timeline) -> tuple[Operation, ...]:
    """By line of source and what is done there, dearest first."""
    lines: dict[tuple[str, str], timeline.Use] = {}
    for (where, name), use in played.uses.items():
        instruction = module.computations[where].by_name[name]
        key = module.source(instruction), _what(instruction)
        lines.setdefault(key, timeline.Use()).add(use)
    rows = [
        Operation(source=source, what=what, count=use.count, seconds=use.core, exposed=use.exposed)
        for (source, what), use in lines.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds)[:_DEAREST])


def _what(instruction: hlo.Instruction) -> str:
    """The end of the name that JAX gave an operation, with its direction."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not found:
        return instruction.kind
    backward = "transpose(" in found[1]
    again = "rematted" in found[1] or "checkpoint" in found[1]
    scope = [part for part in found[1].split("/") if part in ("attention", "ffn", "shared_experts")]
    direction = "recomputed" if again and not backward else "backward" if backward else ""
    return " ".join(part for part in (*scope[-1:], found[1].split("/")[-1], direction) if part)
