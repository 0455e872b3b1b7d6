"""Depth costs no compilation: the step of 60 layers is as large a program as that of few, as XLA receives it."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.extend import core

from configs import models
from dsv2_jax.config import SINGLE, Batch, Compute, Config, Mesh
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel.mesh import BATCH, EXPERT
from dsv2_jax.plan import program
from dsv2_jax.training.step import train_step

ROWS, LENGTH = 8, 32


def traced_step(layers: int, mesh: Mesh) -> jax.stages.Traced:
    """The traced training step of the tiny preset's widths with `layers` layers."""
    tiny = models.tiny()
    moe = dataclasses.replace(tiny.moe, budget_sequences=ROWS // (mesh.size(*BATCH) // mesh.size(*EXPERT)))
    model = dataclasses.replace(tiny, num_hidden_layers=layers, moe=moe)
    batch = Batch(size=ROWS, length=LENGTH, micro_size=ROWS)
    config = Config(
        workdir=Path(), tokens=ROWS * LENGTH, model=model, batch=batch, compute=Compute(remat="full"), mesh=mesh
    )
    devices = device_mesh.make(mesh) if mesh != SINGLE else None
    state, leaves = program.arguments(config, devices)
    return train_step.trace(state, leaves, 1e-3, config=config, mesh=devices)


def equations(value: object) -> Iterator[core.JaxprEqn]:
    """All equations of a jaxpr and of those inside it."""
    if isinstance(value, core.ClosedJaxpr):
        value = value.jaxpr
    if isinstance(value, core.Jaxpr):
        for equation in value.eqns:
            yield equation
            for parameter in equation.params.values():
                yield from equations(parameter)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from equations(part)


# On one CPU up to 16 layers are unrolled, for speed; deeper models are scanned as they are on every mesh.
@pytest.mark.parametrize(
    ("mesh", "few"), [(SINGLE, 17), (Mesh(fsdp=2, expert=4), 6)], ids=["one device", "fsdp and expert"]
)
def test_programs_do_not_grow_with_depth(mesh, few):
    sizes = []
    for layers in (few, 60):
        traced = traced_step(layers, mesh)
        instructions = re.findall(r"^\s+%[\w.:#-]+ = ", traced.lower().as_text(), re.MULTILINE)
        sizes.append((len(list(equations(traced.jaxpr))), len(instructions)))
    (traced_few, lowered_few), (traced_60, lowered_60) = sizes
    assert traced_few > 500 and lowered_few > 500
    assert traced_few / 1.3 < traced_60 < traced_few * 1.3
    assert lowered_few / 1.3 < lowered_60 < lowered_few * 1.3
