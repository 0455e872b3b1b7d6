"""A decode step of the engine for TPUs that are not there: every sequence gets one token more."""

import functools
from typing import Any

import jax
import numpy as np

from dsv2_jax.config import Config
from dsv2_jax.inference import programs, sampling
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.parallel import sharding


def setup_of(config: Config, capacity: Capacity, devices: jax.sharding.Mesh) -> programs.Setup:
    """What the engine compiles its programs for."""
    return programs.Setup(
        model=config.model, compute=config.compute, form=capacity.cache, weights=capacity.weights, devices=devices
    )


def arguments(setup: programs.Setup, capacity: Capacity) -> tuple[Any, ...]:
    """Shapes and shardings of the parameters, the cache, the call and the settings of all its rows."""
    prepared, layers = programs.described(setup, capacity.pages, capacity.page)
    call = programs.blank(setup.replicas, capacity.rows, 0, 0, -(-capacity.length // capacity.page))
    rows = sampling.rows([], [], [], capacity.rows)
    rows = sampling.RowSettings(*(np.stack([x] * setup.replicas) for x in rows))
    lanes = sharding.on(setup.devices, programs.BY_REPLICA)
    call, rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lanes), (call, rows))
    return prepared, layers, call, rows


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="layers")
def decode_step(
    prepared: Any, layers: Any, call: programs.StepInputs, rows: sampling.RowSettings, *, setup: programs.Setup
) -> Any:
    """(new tokens, the cache): the engine's two programs of a step without prompts, as one."""
    rows_ZND, _, layers, _ = programs.forward(prepared, layers, call, setup=setup)
    return programs.draw(prepared["head"], rows_ZND, rows, None, setup=setup, top=0), layers
