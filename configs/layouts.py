"""Meshes and batch sizes of presets on TPU slices, for training and serving, as `python -m dsv2_jax.plan` uses them."""

import dataclasses

from dsv2_jax.config import Config, Mesh
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingLayout:
    """The settings of a preset that depend on the slice."""

    mesh: Mesh
    sequences: int  # sequences per step
    remat: str
    micro_size: int = 0  # sequences of a micro-batch; 0: all


LAYOUTS = {
    ("v2_lite", "v5p:2x2x4"): TrainingLayout(mesh=Mesh(fsdp=4, expert=4), sequences=64, remat="attention"),
    ("v2", "v5p:4x8x8"): TrainingLayout(mesh=Mesh(fsdp=32, expert=8), sequences=1024, remat="full"),
    ("v2_long", "v5p:8x8x8"): TrainingLayout(
        mesh=Mesh(fsdp=8, expert=8, context=8), sequences=576, remat="full", micro_size=192
    ),
    ("dense_67b", "v5p:4x8x8"): TrainingLayout(mesh=Mesh(fsdp=256), sequences=1024, remat="attention"),
    # Each sampler device holds 5 of the 160 experts of a layer, and all parameters that the expert axis does not split.
    ("v2_grpo_reasoning", "v5p:4x8x8"): TrainingLayout(
        mesh=Mesh(fsdp=8, expert=32), sequences=1024, remat="full", micro_size=256
    ),
    ("v2_grpo_preference", "v5p:4x8x8"): TrainingLayout(
        mesh=Mesh(fsdp=8, expert=32), sequences=1024, remat="full", micro_size=256
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """The mesh and the capacity of an engine on a slice."""

    mesh: Mesh
    capacity: Capacity


# MLA has a small cache, so each device has its own sequences. The cache of GQA is split by heads.
SERVING = {
    ("v2", "v5p:2x2x2"): Serving(
        mesh=Mesh(fsdp=1, expert=8), capacity=Capacity(rows=552, length=4096, weights="float8", cache="int6")
    ),
    ("dense_67b", "v5p:2x2x2"): Serving(
        mesh=Mesh(fsdp=1, tensor=8), capacity=Capacity(rows=456, length=4096, page=256, weights="float8")
    ),
}


def on_topology(name: str, topology: str) -> Config:
    """The preset `name` with its layout for the topology, or unchanged if there is none."""
    config = PRESETS[name]()
    layout = LAYOUTS.get((name, topology))
    if layout is None:
        return config
    return dataclasses.replace(
        config,
        mesh=layout.mesh,
        batch=dataclasses.replace(
            config.batch, size=layout.sequences, micro_size=layout.micro_size, ramp_from=0, ramp_tokens=0
        ),
        compute=dataclasses.replace(config.compute, remat=layout.remat),
    )
