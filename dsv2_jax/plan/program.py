"""A program of a config, such as its training step or its engine's decode step, compiled for TPUs that are not there.

`python -m dsv2_jax.plan.program FOLDER`, a process of its own, reads FOLDER/request.json and leaves program.json and,
if the program fits the chips, hlo.txt.gz: the optimised and scheduled program of one device.
"""

import dataclasses
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
from dsv2_jax.inference import programs
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.model import transformer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding, xla
from dsv2_jax.plan import decode, network
from dsv2_jax.training.loss import loss
from dsv2_jax.training.step import create, state_specs, train_step
from pallas_kernels.chips import CHIPS

REQUEST, PROGRAM, HLO = "request.json", "program.json", "hlo.txt.gz"
_INTS, _FLOATS = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT"), ("weights_BT",)
_GRPO_FLOATS = ("sampler_BT", "advantages_BT", "old_BT", "reference_BT")
# Training, a forward pass, the masters' way into the engine's layout, or a decode step of an engine of that size.
Work = Literal["step", "forward", "weights"] | Capacity
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler said of a program on one device. Bytes of HBM; if it does not fit, `used` and `limit` alone."""

    fits: bool
    used: int  # the peak, arguments included
    limit: int  # what the compiler lets a program use; 0: it did not say, for it fits
    parameters: int
    optimizer: int
    batch: int
    cache: int  # of generation
    gradients: int  # float32, as large as one moment; they are temporary
    coords: tuple[tuple[int, ...], ...]  # (slice, x, y, z, core) of each device, in the order of the program's devices
    seconds: float
    host_bytes: int  # peak of the compiling process


def arguments(config: Config, devices: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of a step's state and of its batch of `config.batch.size` sequences."""
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


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of these shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(config: Config, devices: list[Any], work: Work = "step") -> tuple[Program, str]:
    """Compiles a step for these devices, whose number is that of `config.mesh`: (the program, its HLO, "" if too big).

    work: the forward pass of a batch instead, as evaluation runs it and a prefill would: nothing is dropped; or the
    engine's weights made of the masters; or a decode step, of a capacity that is resolved. Raises ValueError if the
    config cannot be laid over the devices.
    """
    start = time.monotonic()
    mesh = device_mesh.make(config.mesh, devices)
    if mesh is None:  # shardings, not the default device, say that it is a TPU
        mesh = jax.sharding.Mesh(np.array(devices).reshape((1,) * len(settings.AXES)), settings.AXES)
    cache, optimizer = (), ()
    if isinstance(work, Capacity):
        setup = decode.setup_of(config, work, mesh)
        params, cache, *batch = decode.arguments(setup, work)
        lowered = decode.decode_step.lower(params, cache, *batch, setup=setup)
    else:
        state, batch = arguments(config, mesh)
        params = state.params
        if work == "forward":
            lowered = sums_of_batch.lower(params, batch, config=config, mesh=mesh, loss=loss)
        elif work == "weights":
            batch = ()
            lowered = programs.preparation(decode.setup_of(config, Capacity(), mesh)).lower(params)
        else:
            optimizer, own_loss = state.optimizer, policy.loss if config.grpo.group else loss
            lowered = train_step.lower(state, batch, 1e-3, config=config, loss=own_loss, mesh=mesh)
    used, limit, hlo = 0, 0, ""
    print("compiling", flush=True)
    with tempfile.TemporaryDirectory() as dumps:
        # jaxlib cannot print programs whose collectives the SparseCore runs; the compiler can.
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
            hlo = _as_calls(printed.read_text())
        except jax.errors.JaxRuntimeError as error:
            used, limit = _exhausted(str(error))
            if not used:
                raise
    program = Program(
        fits=bool(hlo),
        used=used,
        limit=limit,
        parameters=shard_bytes(params),
        optimizer=shard_bytes(optimizer),
        batch=shard_bytes(batch),
        cache=shard_bytes(cache),
        gradients=shard_bytes(optimizer) // 2,
        coords=tuple(network.place(device) for device in mesh.devices.flat),
        seconds=time.monotonic() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return program, hlo


def _as_calls(hlo: str) -> str:
    """What the SparseCore runs stands in custom calls of no known target: written as the calls that they are."""
    odd = re.compile(r'\bcustom-call(\([^)]*\)), custom_call_target="TODO\([^"]*", called_computations=\{(%[^}]*)\}')
    return odd.sub(r"call\1, to_apply=\2", hlo)


def _exhausted(message: str) -> tuple[int, int]:
    """(bytes used, bytes there are) of the compiler's complaint about HBM; zeros for any other error."""
    size = r"([\d.]+)([KMG]?)"
    found = re.search(f"Used {size} of {size} hbm", message)
    found = found or re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
    if not found:
        return 0, 0
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])


def main(folder: Path) -> None:
    """Compiles what the folder's request asks for."""
    from jax.experimental import topologies

    request = json.loads((folder / REQUEST).read_text())
    config = settings.from_json(Config, json.dumps(request["config"]))
    name = request["topology"]
    # Two cores that make one device: a v5p's are so by default, a v4's are not.
    joined = {"chip_config_name": "megacore"} if CHIPS[name.split(":")[0]].cores == 2 else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=request["slices"], **joined
    ).devices
    print("tracing", flush=True)
    asked = request["work"]
    work: Any = asked if isinstance(asked, str) else Capacity(**asked)
    program, hlo = compile_step(config, list(devices), work)
    if hlo:
        with gzip.open(folder / HLO, "wt", compresslevel=3) as file:
            file.write(hlo)
    (folder / PROGRAM).write_text(json.dumps(dataclasses.asdict(program)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
