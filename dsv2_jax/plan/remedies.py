"""What would make a program fit that does not: found by compiling, one change after the other."""

import dataclasses
from collections.abc import Callable, Iterator

from dsv2_jax.config import Config
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.parallel.mesh import BATCH
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.program import Work

_LARGER = 2  # so many times the number of chips is doubled


def remedies(
    config: Config, topology: Topology, plan: Callable[[Config, Topology, Work], Estimate], work: Work = "step"
) -> str:
    """A sentence: the least change with which the program fits, or what was tried. plan: compiles."""
    tried = []
    for told, changed, chips, changed_work in _candidates(config, topology, work):
        try:
            result = plan(changed, chips, changed_work)
        except ValueError:  # cannot be laid over these devices
            continue
        m = result.memory
        if result.fits:
            return f"it fits with {told}: {m.peak / 2**30:.2f} GiB" + (
                f" (not with {', '.join(tried)})" if tried else ""
            )
        tried.append(f"{told}, {m.peak / 2**30:.2f} GiB")
    return "nothing that was tried fits" + (f": {'; '.join(tried)}" if tried else "")


def _candidates(config: Config, topology: Topology, work: Work) -> Iterator[tuple[str, Config, Topology, Work]]:
    if isinstance(work, Capacity):
        while work.rows > 1:
            pages = max(work.pages // 2, -(-work.length // work.page) + 1)
            work = dataclasses.replace(work, rows=work.rows // 2, pages=pages)
            yield f"--capacity.rows {work.rows}", config, topology, work
        return
    told = ""
    if config.compute.remat != "full":
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="full"))
        told = "--compute.remat full"
        yield told, config, topology, work
    mesh = config.mesh.resolve(topology.devices * config.mesh.slices)
    least, rows = mesh.size(*BATCH), config.batch.micro_size or config.batch.size
    while rows % 2 == 0 and (rows // 2) % least == 0:
        rows //= 2
        moe = config.model.moe
        if moe.budget_sequences and rows % moe.budget_sequences:
            break
        batch = dataclasses.replace(config.batch, micro_size=rows)
        smaller = dataclasses.replace(config, batch=batch)
        yield " ".join(filter(None, (told, f"--batch.micro_size {rows}"))), smaller, topology, work
    growing = topology
    for _ in range(_LARGER):
        growing = larger(growing)
        mesh = dataclasses.replace(config.mesh, fsdp=-1)
        wider = dataclasses.replace(config, mesh=mesh)
        yield " ".join(filter(None, (told, f"--topology {growing.name} --mesh.fsdp -1"))), wider, growing, work


def larger(topology: Topology) -> Topology:
    """Twice the chips: the smallest dimension doubled."""
    shape = list(topology.shape)
    shape[shape.index(min(shape))] *= 2
    return Topology(f"{topology.name.split(':')[0]}:{'x'.join(map(str, sorted(shape)))}")
