"""Tries layouts: every mesh that the model and the batch allow, pruned by arithmetic; the best are compiled, ranked."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from dsv2_jax import parameters
from dsv2_jax.config import Config, Mesh, check
from dsv2_jax.parallel.mesh import BATCH
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import Estimate, model_flops

_COMPILED = 4  # of the candidates, the most promising
_EFFICIENCY = 0.55  # of the MXU's peak, a guess: the same for all, so it decides nothing but what traffic weighs
_STORED = {"full": 1, "attention": 3}  # arrays of [tokens, d] that a layer keeps, roughly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """A layout before it is compiled: seconds and bytes by arithmetic."""

    config: Config
    compute: float
    traffic: float  # seconds on the links, were nothing hidden
    memory: float  # bytes of a device

    @property
    def step(self) -> float:
        """Seconds: of what travels a third is taken to be exposed, and all that is longer than the work."""
        return max(self.compute + self.traffic / 3, self.traffic)


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Every mesh of powers of two over fsdp, expert, context and tensor, with either remat, that the config allows."""
    sizes = [2**i for i in range(topology.devices.bit_length())]
    for expert, context, tensor in itertools.product(sizes, repeat=3):
        rest = topology.devices // (expert * context * tensor)
        if rest * expert * context * tensor != topology.devices:
            continue
        for remat in _STORED:
            mesh = Mesh(fsdp=rest, expert=expert, context=context, tensor=tensor)
            compute = dataclasses.replace(config.compute, remat=remat)
            candidate = dataclasses.replace(config, mesh=mesh, compute=compute)
            try:
                laid_out(candidate, topology)
            except ValueError:
                continue
            yield candidate


def guess(config: Config, topology: Topology) -> Guess:
    """Arithmetic: FLOPs at a fixed efficiency, bytes of weights and tokens over the links, state and stored layers."""
    model, mesh, chip = config.model, config.mesh, topology.chip
    moe, width = model.moe, model.hidden_size
    rows = config.batch.micro_size or config.batch.size
    tokens = rows // mesh.size(*BATCH) * config.batch.length // mesh.context  # of a device
    passes = config.batch.size // rows
    total = parameters.count(model)
    experts = model.moe_layers * 3 * moe.n_routed_experts * width * moe.moe_intermediate_size
    gathered = (experts / mesh.expert + total - experts) / mesh.tensor * (1 - 1 / max(1, mesh.fsdp * mesh.context))
    copies = min(mesh.expert - 1, moe.topk_group if mesh.expert > moe.num_experts_per_tok else mesh.expert - 1)
    travelling = 5 * model.moe_layers * copies * tokens * width if mesh.expert > 1 else 0
    summed = 6 * 2 * model.num_hidden_layers * tokens * width if mesh.tensor > 1 else 0
    again = 4 / 3 if config.compute.remat == "full" else 7 / 6
    flops = model_flops(model, config.batch.length) * tokens / mesh.tensor * again
    stored = _STORED[config.compute.remat] * model.num_hidden_layers * tokens * width * 2
    return Guess(
        config=config,
        compute=passes * flops / (chip.peak * chip.cores * _EFFICIENCY),
        traffic=passes * 2 * (3 * gathered + travelling + summed) / (chip.links / 2 * chip.link),
        memory=16 * total / topology.devices + stored + 4 * gathered / max(1, model.num_hidden_layers),
    )


def search(config: Config, topology: Topology, plan: Callable[[Config, Topology], Estimate]) -> list[Estimate]:
    """The compiled layouts, those that fit first and the fastest of these first. plan: compiles and reads.

    Raises ValueError if no mesh can be laid over the topology.
    """
    check(config.mesh.slices == 1, "--search knows one slice only: leave mesh.slices 1")
    guesses = [guess(candidate, topology) for candidate in candidates(config, topology)]
    check(bool(guesses), f"no mesh of {topology.name} suits this model and batch")
    likely = [g for g in guesses if g.memory < topology.chip.hbm_size] or guesses
    best = sorted(likely, key=lambda g: g.step)[:_COMPILED]
    results = [plan(g.config, topology) for g in best]
    return sorted(results, key=lambda e: (not e.fits, e.time.step if e.time else e.memory.peak))


def show(results: list[Estimate]) -> str:
    """The ranked table, and the winner as flags."""
    head = f"{'mesh':44}{'remat':>10}{'step ms':>11}{'MFU':>8}{'exposed':>9}{'wire GiB':>10}{'peak GiB':>10}"
    lines = [head]
    for e in results:
        mesh = " x ".join(f"{axis} {n}" for axis, n in e.mesh.items() if n > 1) or "one device"
        t = e.time
        figures = f"{t.step * 1e3:11,.1f}{e.mfu:8.1%}{t.exposed / t.step:9.1%}" if t else f"{'does not fit':>28}"
        lines.append(f"{mesh:44}{e.remat:>10}{figures}{e.wire / 2**30:10.2f}{e.memory.peak / 2**30:10.2f}")
    first = results[0]
    flags = " ".join(f"--mesh.{axis} {n}" for axis, n in first.mesh.items() if n > 1)
    return "\n".join([*lines, "", f"best: {flags} --compute.remat {first.remat}"])
