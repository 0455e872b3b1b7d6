"""Checkpoints of a run: saved in the background, verified by checksums when they are read.

Orbax writes a checkpoint under a temporary name and renames it when every byte is written. If the process is killed, a
checkpoint is therefore complete or absent.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dsv2_jax import parameters
from dsv2_jax.config import Config, check
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.mesh import sizes
from dsv2_jax.training import integrity
from dsv2_jax.training.run_folder import complete_steps, flat, latest_step, read_config, step_folder, write_config
from dsv2_jax.training.step import State

_WRITTEN = ("data", "progress")  # JSON items of a checkpoint
_WORTH_SLICING = 64 * 2**20  # bytes of a stacked parameter from which it is stored in chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Steps taken so far, and the tokens of their batches: rows x length of each, padding included."""

    step: int = 0
    tokens: int = 0


class Checkpoints:
    """Saves and restores the checkpoints of one run; a context manager that waits for the last save."""

    def __init__(self, run: Path, keep: int) -> None:
        self._run = run
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: State, batches: grain.DatasetIterator, progress: Progress) -> None:
        """Saves in the background and returns when the state's buffers may be donated. Skips a saved step."""
        if progress.step in self._manager.all_steps():
            return
        written = {"data": batches.get_state(), "progress": dataclasses.asdict(progress)}
        checksums = _checksums({"params": state.params, "optimizer": state.optimizer}, written)
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=_in_slices(state.params),
                optimizer=ocp.args.StandardSave(state.optimizer),
                **{name: ocp.args.JsonSave(item) for name, item in (written | {"checksums": checksums}).items()},
            ),
        )

    def restore(
        self,
        initial: Callable[[], State],
        batches: grain.DatasetIterator,
        shardings: State,
        start: Callable[[], Any] | None = None,
    ) -> tuple[State, Progress]:
        """Restores the newest checkpoint and the position of `batches`; without a checkpoint, compiles `initial()`.

        With `start`, a new run's state takes the parameters that `start()` returns. The state is laid out by
        `shardings`, also if the run that saved it had another layout. Raises ValueError for a damaged checkpoint and
        for one that holds parameters only.
        """
        steps = complete_steps(self._run)
        if not steps:
            if start is None:
                return jax.jit(initial, out_shardings=shardings)(), Progress()
            state_of = jax.jit(lambda p: initial()._replace(params=p), out_shardings=shardings, donate_argnums=0)
            return state_of(start()), Progress()
        step = steps[-1]
        check(
            (step_folder(self._run, step) / "optimizer").exists(),
            f"the checkpoint of step {step} in {self._run} holds parameters only, as an imported model's does: "
            "it can be evaluated, but training cannot continue from it",
        )
        shapes = jax.tree.map(
            lambda s, on: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), jax.eval_shape(initial), shardings
        )
        with reading(self._run, step):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(shapes.params),
                    optimizer=ocp.args.StandardRestore(shapes.optimizer),
                    data=ocp.args.JsonRestore(),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = Progress(**items["progress"])
        arrays, written = ({name: items[name] for name in names} for names in (("params", "optimizer"), _WRITTEN))
        check_intact(self._run, step, lambda: _checksums(arrays, written))
        batches.set_state(items["data"])
        return State(items["params"], items["optimizer"], jax.device_put(np.int32(step), shardings.step)), progress


def restore_params(run: Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, dict]:
    """The config and the float32 parameters (`parameters.tree`) of a run, from the newest or the given step.

    The parameters are laid out on the mesh by `sharding.param_specs`, or without one on the first device. Raises
    FileNotFoundError if run or step is missing, ValueError if the checkpoint is damaged or does not match the config.
    """
    config = read_config(run)
    step = latest_step(run) if step is None else step
    folder = epath.Path(step_folder(run, step)).absolute() / "params"
    if not folder.is_dir():
        raise FileNotFoundError(f"no parameters of step {step} in {run}: {folder} is missing")
    expected = parameters.tree(config.model)
    # Used without a Checkpointer, which would warn that `params`, one item of a checkpoint, is not a checkpoint.
    reader = ocp.StandardCheckpointHandler()
    with reading(run, step):
        stored = jax.tree.map(lambda array: tuple(array.shape), reader.metadata(folder).tree)
    check_shapes(expected, stored, run)
    placed = sharding.on(mesh, sharding.param_specs(config.model, sizes(mesh)))
    shapes = {
        part: {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed[part][name]) for name, shape in n.items()}
        for part, n in expected.items()
    }
    with reading(run, step):
        params = reader.restore(folder, args=ocp.args.StandardRestore(shapes))
    check_intact(run, step, lambda: _checksums({"params": params}, {}))
    return config, params


def save_params(run: Path, config: Config, params: dict, step: int = 0) -> None:
    """Writes config.json and one checkpoint that holds parameters only, such as those of an imported model.

    Raises ValueError if the folder already holds that checkpoint or the parameters do not match the config.
    """
    check_shapes(parameters.tree(config.model), jax.tree.map(lambda a: tuple(a.shape), params), run)
    check(not step_folder(run, step).exists(), f"{run} already holds a checkpoint of step {step}")
    run.mkdir(parents=True, exist_ok=True)
    write_config(run, config)
    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        written = {"progress": dataclasses.asdict(Progress(step=step))}
        checksums = _checksums({"params": params}, written)
        manager.save(
            step,
            args=ocp.args.Composite(
                params=_in_slices(params),
                **{name: ocp.args.JsonSave(item) for name, item in (written | {"checksums": checksums}).items()},
            ),
        )


@contextlib.contextmanager
def reading(run: Path, step: int) -> Iterator[None]:
    """A context for reading a checkpoint: converts a library's errors about its files to a one-line ValueError.

    It does not change RuntimeError, which devices and other processes raise.
    """
    try:
        yield
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # Orbax wraps TensorStore's error, which names the array
            root = root.__cause__
        first_line = (str(root).splitlines() or [""])[0]
        damage = f"the checkpoint of step {step} in {run} is damaged: {type(root).__name__}: {first_line}"
        raise ValueError(f"{damage}; {_remedy(run, step)}") from error


def check_intact(run: Path, step: int, found: Callable[[], dict[str, Any]]) -> None:
    """Compares checksums with those saved with the checkpoint; raises ValueError naming the items that differ.

    found() gives the checksums of the items that were read, all or some. A checkpoint without checksums is not
    checked, and a line on stderr says so.
    """
    path = step_folder(run, step) / "checksums" / "metadata"
    if not path.parent.is_dir():
        if processes.is_first():
            note = f"the checkpoint of step {step} in {run} was saved without checksums and is not checked for damage"
            print(note, file=sys.stderr, flush=True)
        return
    with reading(run, step):
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    different = [name for name, value in sorted(found().items()) if saved.get(name) != value]
    check(
        not different,
        f"the checkpoint of step {step} in {run} is damaged: {', '.join(different[:3])} is not what was saved; "
        f"{_remedy(run, step)}",
    )


def _remedy(run: Path, step: int) -> str:
    older = [s for s in complete_steps(run) if s < step]
    if not older:
        return "there is no older checkpoint"
    return f"remove {step_folder(run, step)} to use step {older[-1]} (older checkpoints: {', '.join(map(str, older))})"


def _checksums(arrays: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    return integrity.sums(arrays) | {name: integrity.of_json(value) for name, value in written.items()}


def check_shapes(expected: dict, found: dict, run: Path) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown, or has another shape than expected."""
    want, have = flat(expected), flat(found)
    for name in sorted(set(want) | set(have)):
        check(name in have, f"the checkpoint in {run} lacks the parameter {name} of the config")
        check(name in want, f"the checkpoint in {run} holds a parameter {name} that the config does not have")
        check(
            tuple(want[name]) == tuple(have[name]),
            f"the parameter {name} in {run} has the shape {tuple(have[name])}, the config says {tuple(want[name])}",
        )


def _in_slices(params: dict) -> ocp.args.StandardSave:
    """Stores large stacked weights in chunks of one layer or one expert, so that a slice can be read alone."""

    def leaf(path: tuple, array: jax.Array) -> ocp.SaveArgs:
        part, name = (key.key for key in path)
        axes = (0, 1) if parameters.letters(name)[0] == "E" else (0,)
        if part in ("embed", "head") or array.nbytes < _WORTH_SLICING:
            return ocp.SaveArgs()
        size = array.nbytes // math.prod(array.shape[axis] for axis in axes)
        return ocp.SaveArgs(chunk_byte_size=size, shard_axes=axes)

    return ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(leaf, params))
