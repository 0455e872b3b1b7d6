"""Compiles a program of a config for TPUs that are not attached: a training step, a forward pass or a decode step.

`python -m dsv2_jax.plan.program FOLDER` runs in a separate process. It reads FOLDER/request.json and writes
FOLDER/program.json and, if the program fits the HBM, FOLDER/hlo.txt.gz: the optimised, scheduled HLO of one device.
"""

import dataclasses
import functools
import gzip
import json
import math
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import config as settings
from dsv2_jax.alignment import policy
from dsv2_jax.config import Config
from dsv2_jax.evaluation.perplexity import sums_of_batch
from dsv2_jax.inference import programs, sampling
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.model import transformer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding, xla
from dsv2_jax.plan import network
from dsv2_jax.training.loss import loss
from dsv2_jax.training.step import create, state_specs, train_step
from pallas_kernels.chips import CHIPS

REQUEST, PROGRAM, HLO = "request.json", "program.json", "hlo.txt.gz"
_INTS, _FLOATS = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT"), ("weights_BT",)
_GRPO_FLOATS = ("sampler_BT", "advantages_BT", "old_BT", "reference_BT")
# A training step, a forward pass, the conversion of the parameters to the engine's weights, or a decode step.
Work = Literal["step", "forward", "weights"] | Capacity
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """The compiler's figures for one device, in bytes of HBM. If the program does not fit, `used` is its demand."""

    fits: bool
    used: int  # the peak, arguments included
    limit: int  # bytes that a program may use; 0 if it fits, because the compiler then does not report them
    parameters: int
    optimizer: int
    batch: int
    cache: int  # the KV cache of a decode step
    gradients: int  # float32, as large as one moment; temporary
    coords: tuple[tuple[int, ...], ...]  # (slice, x, y, z, core) of each device, in the order of the program's devices
    seconds: float  # of compilation
    host_bytes: int  # peak memory of the compiling process


def arguments(config: Config, devices: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of a training step's state and batch of `config.batch.size` sequences."""
    rows = config.batch.micro_size or config.batch.size
    shape = config.batch.size // rows, rows, config.batch.length

    def placed(leaf: Any, on: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on)

    state = jax.eval_shape(lambda: create(transformer.init(config.model, jax.random.key(0)), config))
    state = jax.tree.map(placed, state, sharding.on(devices, state_specs(config)))
    leaves: dict[str, Any] = dict.fromkeys(_INTS, jnp.int32) | dict.fromkeys(_FLOATS, jnp.float32)
    leaves |= dict.fromkeys(_GRPO_FLOATS, jnp.float32) if config.grpo.group else {"bytes_BT": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in leaves.items()}
    if config.grpo.replay:
        chosen = config.model.moe_layers, config.model.moe.num_experts_per_tok
        batch["experts_BTLK"] = jax.ShapeDtypeStruct((*shape, *chosen), jnp.int16)
    batch = {name: placed(leaf, sharding.on(devices, sharding.batch_spec(name))) for name, leaf in batch.items()}
    return state, batch


def setup_of(config: Config, capacity: Capacity, devices: jax.sharding.Mesh) -> programs.Setup:
    """The static arguments of the engine's programs."""
    return programs.Setup(
        model=config.model, compute=config.compute, form=capacity.cache, weights=capacity.weights, devices=devices
    )


def decode_arguments(setup: programs.Setup, capacity: Capacity) -> tuple[Any, ...]:
    """Shapes and shardings of the parameters, the cache, the call and the sampling settings of all rows."""
    prepared, layers = programs.described(setup, capacity.pages, capacity.page)
    call = programs.blank(setup.replicas, capacity.rows, 0, 0, -(-capacity.length // capacity.page))
    rows = sampling.rows([], [], [], capacity.rows)
    rows = sampling.RowSettings(*(np.stack([x] * setup.replicas) for x in rows))
    placed = sharding.on(setup.devices, programs.BY_REPLICA)
    call, rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (call, rows))
    return prepared, layers, call, rows


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="layers")
def decode_step(
    prepared: Any, layers: Any, inputs: programs.StepInputs, rows: sampling.RowSettings, *, setup: programs.Setup
) -> Any:
    """Returns (new tokens, the cache): the engine's forward pass and its sampling in one program, without prompts."""
    rows_ZND, _, layers, _ = programs.forward(prepared, layers, inputs, setup=setup)
    return programs.draw(prepared["head"], rows_ZND, rows, None, setup=setup, top=0), layers


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of these shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def lower(config: Config, mesh: jax.sharding.Mesh, work: Work) -> tuple[Any, Any, Any, Any, Any]:
    """Traces a program: (lowered, parameters, optimizer state, batch, KV cache), the last four as shapes."""
    if isinstance(work, Capacity):
        setup = setup_of(config, work, mesh)
        params, cache, *batch = decode_arguments(setup, work)
        return decode_step.lower(params, cache, *batch, setup=setup), params, (), batch, cache
    state, batch = arguments(config, mesh)
    if work == "forward":
        lowered = sums_of_batch.lower(state.params, batch, config=config, mesh=mesh, loss=loss)
        return lowered, state.params, (), batch, ()
    if work == "weights":
        lowered = programs.preparation(setup_of(config, Capacity(), mesh)).lower(state.params)
        return lowered, state.params, (), (), ()
    step_loss = policy.loss if config.grpo.group else loss
    lowered = train_step.lower(state, batch, 1e-3, config=config, loss=step_loss, mesh=mesh)
    return lowered, state.params, state.optimizer, batch, ()


def compile_program(config: Config, devices: list[Any], work: Work = "step") -> tuple[CompiledProgram, str]:
    """Compiles a program for these devices, as many as `config.mesh` has: (its figures, its HLO, "" if too big).

    work: "step" trains; "forward" is the forward pass of a batch without token dropping, as in evaluation or a prefill;
    "weights" converts the parameters to the engine's weights; a resolved capacity is a decode step. Raises ValueError
    if the config does not fit the devices' mesh.
    """
    start = time.monotonic()
    mesh = device_mesh.make(config.mesh, devices)
    if mesh is None:  # without a mesh JAX would compile for the default device, a CPU
        mesh = jax.sharding.Mesh(np.array(devices).reshape((1,) * len(settings.AXES)), settings.AXES)
    lowered, params, optimizer, batch, cache = lower(config, mesh, work)
    used, limit, hlo = 0, 0, ""
    print("compiling", flush=True)
    with tempfile.TemporaryDirectory() as dumps:
        # The compiler dumps the HLO: jaxlib cannot print programs with collectives on the SparseCores.
        dump = {
            "xla_dump_to": dumps,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_module_re": ".*(train_step|sums_of_batch|prepare_weights|decode_step).*",
        }
        try:
            memory = lowered.compile(xla.options() | dump).memory_analysis()
            assert memory is not None
            used = memory.peak_memory_in_bytes
            (printed,) = Path(dumps).glob("*after_codegen.txt")
            hlo = sparsecore_calls(printed.read_text())
        except jax.errors.JaxRuntimeError as error:
            used, limit = out_of_memory(str(error))
            if not used:
                raise
    program = CompiledProgram(
        fits=bool(hlo),
        used=used,
        limit=limit,
        parameters=shard_bytes(params),
        optimizer=shard_bytes(optimizer),
        batch=shard_bytes(batch),
        cache=shard_bytes(cache),
        gradients=shard_bytes(optimizer) // 2,
        coords=tuple(network.coordinates(device) for device in mesh.devices.flat),
        seconds=time.monotonic() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return program, hlo


def sparsecore_calls(hlo: str) -> str:
    """Rewrites the custom calls that run on the SparseCores, which have no known target, as plain calls."""
    custom = re.compile(r'\bcustom-call(\([^)]*\)), custom_call_target="TODO\([^"]*", called_computations=\{(%[^}]*)\}')
    return custom.sub(r"call\1, to_apply=\2", hlo)


def out_of_memory(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) from the compiler's message about HBM; zeros for any other message."""
    size = r"([\d.]+)([KMG]?)"
    found = re.search(f"Used {size} of {size} hbm", message)
    found = found or re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if not found:
        return 0, 0
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])


def main(folder: Path) -> None:
    """Compiles the program that the folder's request describes."""
    from jax.experimental import topologies

    request = json.loads((folder / REQUEST).read_text())
    config = settings.from_json(Config, json.dumps(request["config"]))
    name = request["topology"]
    # On a chip with two cores per device, the cores form a megacore: the default for a v5p, not for a v4.
    megacore = {"chip_config_name": "megacore"} if CHIPS[name.split(":")[0]].cores == 2 else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=request["slices"], **megacore
    ).devices
    print("tracing", flush=True)
    requested = request["work"]
    work: Any = requested if isinstance(requested, str) else Capacity(**requested)
    program, hlo = compile_program(config, list(devices), work)
    if hlo:
        with gzip.open(folder / HLO, "wt", compresslevel=3) as file:
            file.write(hlo)
    (folder / PROGRAM).write_text(json.dumps(dataclasses.asdict(program)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
