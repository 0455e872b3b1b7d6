"""A step on any mesh is the step of a single device: losses, gradients, and which pairs are dropped."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import batch, eight_heads, train

from configs import models
from dsv2_jax.config import SINGLE, Batch, Compute, Config, Mesh, Model, Optimizer
from dsv2_jax.model import transformer
from dsv2_jax.parallel.mesh import BATCH, EXPERT
from dsv2_jax.training.loop import resolve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forget_each")]

ROWS, LENGTH, STEPS, LR = 16, 32, 3, 1e-3

# Layout and the sequences that share a budget: within one device, or spread over several.
LAYOUTS = {
    "data": (Mesh(data=8, fsdp=1), 2),
    "fsdp": (Mesh(fsdp=8), 1),
    "expert": (Mesh(fsdp=1, expert=8), 16),
    "context": (Mesh(fsdp=1, context=8), 8),
    "tensor": (Mesh(fsdp=1, tensor=8), 16),
    "zero1": (Mesh(fsdp=8, shard="optimizer"), 2),
    "fsdp+expert": (Mesh(fsdp=2, expert=4), 4),
    "data+expert": (Mesh(data=4, fsdp=1, expert=2), 4),
    "expert+context": (Mesh(fsdp=1, expert=4, context=2), 16),
    "fsdp+expert+tensor": (Mesh(fsdp=2, expert=2, tensor=2), 2),
    "data+fsdp+context": (Mesh(data=2, fsdp=2, context=2), 4),
    "zero1+fsdp+expert": (Mesh(fsdp=2, expert=4, shard="optimizer"), 8),
}


# (layout, micro-batches, MoE layers)
PIPELINES = {
    "pipeline": (Mesh(fsdp=1, pipeline=8), 8, 8),
    "pipeline+fsdp+expert": (Mesh(pipeline=2, fsdp=2, expert=2), 2, 2),
    "data+pipeline+tensor": (Mesh(data=2, pipeline=2, fsdp=1, tensor=2), 4, 2),
}


def config(mesh: Mesh, budget: int, dropping: bool = True, micro_batches: int = 1, moe_layers: int = 2) -> Config:
    """A small V2-like model, with 3 of 8 groups per token and dimensions that eight devices divide."""
    tiny = dataclasses.replace(models.tiny(), num_hidden_layers=1 + moe_layers)
    moe = dataclasses.replace(
        tiny.moe, budget_sequences=budget, capacity_factor=0.7 if dropping else 0.0, exempt_fraction=0.3
    )
    return Config(
        workdir=Path(),
        tokens=ROWS * LENGTH,
        model=dataclasses.replace(tiny, moe=moe, attention=eight_heads()),
        batch=Batch(size=ROWS, length=LENGTH, micro_size=ROWS // micro_batches),
        # AdamW divides gradients by their size: with a small epsilon, those that are all rounding would decide.
        optimizer=Optimizer(clip_norm=0.5, epsilon=1e-4),
        compute=Compute(dtype="float32", remat="full" if mesh.size("fsdp", "expert") == 8 else "none", loss_chunk=64),
        mesh=mesh,
    )


@functools.cache
def initial(model: Model) -> dict:
    """Parameters to start from, the same numbers for every layout."""
    return jax.device_get(jax.jit(lambda: transformer.init(model, jax.random.key(1)))())


def run(wanted: Config, steps: int) -> tuple[list[dict], dict, dict]:
    """(metrics of every step, parameters after the last, gradients of the first, scaled) as host arrays."""
    wanted = resolve(wanted) if wanted.mesh != SINGLE else wanted
    micro_batches = wanted.batch.size // wanted.batch.micro_size
    data = batch(wanted.model, ROWS, LENGTH, micro_batches, second=11, padding=25)
    return train(wanted, initial(wanted.model), data, steps, LR)


@pytest.fixture(scope="module")
def alone():
    """Runs on one device, by budget and dropping: each is made once."""
    made = {}

    def get(budget: int, dropping: bool):
        if (budget, dropping) not in made:
            made[budget, dropping] = run(config(SINGLE, budget, dropping), STEPS)
        return made[budget, dropping]

    return get


# Without drops, too, where pairs travel or rows are cut; elsewhere the experts' code is that of one device.
DROPLESS = ("expert", "fsdp+expert+tensor", "data+fsdp+context")


@pytest.mark.parametrize(
    ("name", "dropping"),
    [*((name, True) for name in LAYOUTS), *((name, False) for name in DROPLESS)],
    ids=[*LAYOUTS, *(f"{name}, dropless" for name in DROPLESS)],
)
def test_layout_equals_one_device(name, dropping, alone):
    mesh, budget = LAYOUTS[name]
    compare(run(config(mesh, budget, dropping), STEPS), alone(budget, dropping), dropping)


@pytest.mark.parametrize(
    ("name", "dropping"),
    [*((name, True) for name in PIPELINES), ("pipeline+fsdp+expert", False)],
    ids=[*PIPELINES, "pipeline+fsdp+expert, dropless"],
)
def test_pipeline_equals_one_device(name, dropping):
    mesh, micro_batches, moe_layers = PIPELINES[name]
    budget = ROWS // micro_batches // (mesh.size(*BATCH) // mesh.size(*EXPERT))
    ours, theirs = (config(m, budget, dropping, micro_batches, moe_layers) for m in (mesh, SINGLE))
    compare(run(ours, STEPS), run(theirs, STEPS), dropping)


def compare(ours, theirs, dropping):
    """Compares the figures of every step, the parameters after the last one, and the gradients of the first."""
    for step, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert (b["dropped"] > 0.05) == dropping
        for figure, value in b.items():
            np.testing.assert_allclose(a[figure], value, rtol=1e-5, atol=1e-6, err_msg=f"{figure}, step {step}")
    for what, a, b in (("parameter", ours[1], theirs[1]), ("gradient", ours[2], theirs[2])):
        for part, named in b.items():
            for name_, value in named.items():
                scale = np.abs(value).max()
                np.testing.assert_allclose(
                    a[part][name_], value, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{what} {part}.{name_}"
                )
