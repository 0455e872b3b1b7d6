"""The run folder: what lies where, and checkpoints that are whole or absent, whenever the process is killed.

    config.json            the config that made the run; its `init` names the very step that the run started from
    init_digest            a digest of the parameters that the run started from, if it has an init
    tokenizer/             its tokenizer
    checkpoints/<step>/    params, optimizer, data (the input pipeline's state), progress (step and tokens), and
                           checksums of all of these, which are checked on restore
    lease                  says which process trains here; empty when none does
    metrics.jsonl          a line for every log and evaluation      tensorboard/   the same for TensorBoard
    plots/                 PNG files, drawn at the end

Orbax writes a checkpoint beside its final name and renames it when every byte is down, in the background.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
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
from dsv2_jax.config import Config, check, from_json, to_json
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.mesh import sizes
from dsv2_jax.training import integrity
from dsv2_jax.training.step import State

# What a run may change when it goes on: none of it changes what one step computes from the same state and batch.
# `tokens` moves the schedule's fractions, and is how a finished run is made longer.
FREE = (
    "workdir",
    "resume",
    "tokens",
    "epochs",
    "cadence",
    "data.folder",
    "mesh",
    "processes",
    "compute.remat",
    "compute.loss_chunk",
    "grpo.steps",
    "grpo.offload",
)

_WRITTEN = ("data", "progress")  # items of a checkpoint in JSON
_DIGEST = "init_digest"
_WORTH_SLICING = 64 * 2**20  # bytes of a stacked parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come: steps taken, and tokens of their batches (a batch counts its rows x length)."""

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
        """Saves in the background; returns when the state's buffers may be donated. A step already there stays."""
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
        """The newest checkpoint, and `batches` moved to where it was then; without one, `initial()`, jitted.

        With `start`, the initial state is built around the parameters that it returns. Either is laid out by
        `shardings`, whatever the layout of the run that saved it. Raises ValueError for a checkpoint of parameters
        alone, and for a damaged one.
        """
        steps = whole_steps(self._run)
        if not steps:
            if start is None:
                return jax.jit(initial, out_shardings=shardings)(), Progress()
            around = jax.jit(lambda p: initial()._replace(params=p), out_shardings=shardings, donate_argnums=0)
            return around(start()), Progress()
        step = steps[-1]
        check(
            (_folder(self._run, step) / "optimizer").exists(),
            f"the checkpoint of step {step} in {self._run} holds parameters only, as an imported model's does: "
            "it can be evaluated, but there is no training to go on with",
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


def whole_steps(run: Path) -> list[int]:
    """The steps of the run's whole checkpoints, oldest first.

    Orbax gives a checkpoint its name when it is whole. A folder of that name without metadata is something else: what
    an interrupted copy or removal left.
    """
    folders = (run / "checkpoints").glob("*")
    return sorted(int(f.name) for f in folders if f.name.isdigit() and (f / "params" / "_METADATA").is_file())


def latest_step(run: Path) -> int:
    """The step of the run's newest whole checkpoint. Raises FileNotFoundError if the folder holds none."""
    steps = whole_steps(run)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run}: a run's folder holds config.json and checkpoints/<step>/")
    return steps[-1]


def locate(folder: Path) -> tuple[Path, int]:
    """The run and the step that a path names: a run's folder its newest, and `checkpoints/<step>` in it that one.

    Raises FileNotFoundError if there is no checkpoint.
    """
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parent.parent, int(folder.name)
    return folder, latest_step(folder)


def read_config(run: Path) -> Config:
    """The config of the run in this folder. Raises FileNotFoundError, or ValueError for one that cannot be read."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {run}: {path} is missing")
    return from_json(Config, path.read_text(encoding="utf-8"))


def restore_params(run: Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Config, dict]:
    """The config and the float32 parameters of a run: the tree of `parameters.tree`, from the newest or a given step.

    With a mesh, laid over it by `sharding.param_specs`, else on the first device. Raises FileNotFoundError if run or
    step is missing, ValueError if the checkpoint is damaged or not what the config says.
    """
    config = read_config(run)
    step = latest_step(run) if step is None else step
    folder = epath.Path(_folder(run, step)).absolute() / "params"
    if not folder.is_dir():
        raise FileNotFoundError(f"no parameters of step {step} in {run}: {folder} is missing")
    expected = parameters.tree(config.model)
    reader = ocp.StandardCheckpointHandler()  # a Checkpointer around it would warn that one item is not a checkpoint
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
    """Writes a run's folder around finished parameters, such as an imported model's: config.json and one checkpoint.

    Raises ValueError if the folder already holds that checkpoint or the parameters are not those of the config.
    """
    check_shapes(parameters.tree(config.model), jax.tree.map(lambda a: tuple(a.shape), params), run)
    check(not (run / "checkpoints" / str(step)).exists(), f"{run} already holds a checkpoint of step {step}")
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
    """Around the reading of a checkpoint: whatever a library raises about its files becomes one line.

    What devices and other processes raise is a RuntimeError, and passes.
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
        raise ValueError(f"{damage}; {_way_on(run, step)}") from error


def check_intact(run: Path, step: int, found: Callable[[], dict[str, Any]]) -> None:
    """Raises ValueError naming the first item whose checksum is not the one that was saved with the checkpoint.

    found: the checksums of what was read, all of them or some. A checkpoint saved without checksums is not checked,
    and a line on stderr says so.
    """
    path = _folder(run, step) / "checksums" / "metadata"
    if not path.parent.is_dir():
        if processes.is_first():
            told = f"the checkpoint of step {step} in {run} was saved without checksums and is not checked for damage"
            print(told, file=sys.stderr, flush=True)
        return
    with reading(run, step):
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    different = [name for name, value in sorted(found().items()) if saved.get(name) != value]
    check(
        not different,
        f"the checkpoint of step {step} in {run} is damaged: {', '.join(different[:3])} is not what was saved; "
        f"{_way_on(run, step)}",
    )


def _way_on(run: Path, step: int) -> str:
    older = [s for s in whole_steps(run) if s < step]
    if not older:
        return "there is no older checkpoint"
    return f"remove {_folder(run, step)} to use step {older[-1]} (older checkpoints: {', '.join(map(str, older))})"


def _checksums(arrays: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    return integrity.sums(arrays) | {name: integrity.of_json(value) for name, value in written.items()}


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def open_run(config: Config) -> Config:
    """Makes the run's folder and writes config.json; a run that is there must be one that this config can go on with.

    Returns the config with its `init` pinned: the folder of a run that may grow becomes the step that is its newest
    when this run begins, and stays it. Raises ValueError if a field outside `FREE` differs from the saved config, if
    there is a run and `config.resume` is off, and for a run whose checkpoints are lost.
    """
    run, whole = config.workdir, whole_steps(config.workdir)
    others = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit() and int(path.name) not in whole]
    if whole:  # without one there is nothing to go on with
        check(config.resume, f"{run} holds a run already; choose another --workdir, or leave out --no-resume to go on")
        saved = read_config(run)
        config = dataclasses.replace(config, init=_kept_init(saved, config.init))
        check_same(dataclasses.replace(saved, init=config.init), config)
    else:
        _check_nothing_lost(run, others)
        config = dataclasses.replace(config, init=_pinned(config.init))
        if processes.is_first():
            (run / _DIGEST).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    if processes.is_first():
        for path in others:  # Orbax would take them for checkpoints: skip saves before their step, and count them
            print(f"{path} is not a whole checkpoint; it is now {path.name}.unfinished", file=sys.stderr, flush=True)
            path.rename(path.with_name(f"{path.name}.unfinished"))
        write_config(run, config)
    return config


def keep_init_digest(run: Path, digest: str) -> None:
    """Keeps the digest of the parameters that the run starts from; where there is one, it must be the same.

    Raises ValueError if it is not: then the checkpoint that the run started from has been written anew.
    """
    path = run / _DIGEST
    if path.is_file():
        check(
            path.read_text(encoding="utf-8").strip() == digest,
            f"{read_config(run).init} no longer holds the parameters that the run in {run} started from: "
            "put them back, or give another --workdir for a new run",
        )
    elif processes.is_first():
        path.write_text(digest + "\n", encoding="utf-8")


def _pinned(init: Path | None) -> Path | None:
    """`checkpoints/<step>` of the newest step of a run's folder, the first process's in all; any other as it is."""
    if init is None or not (init / "checkpoints").is_dir():
        return init
    step = processes.gathered(np.asarray(latest_step(init)))[0]
    return init / "checkpoints" / str(step)


def _kept_init(saved: Config, given: Path | None) -> Path | None:
    """The init of a run that goes on: its own. Raises ValueError if another is given."""
    kept = saved.init
    if given is not None:
        names = [] if kept is None else [kept, kept.parent.parent] if kept.parent.name == "checkpoints" else [kept]
        check(
            given.resolve() in [name.resolve() for name in names],
            f"--init is {given}, but the run in {saved.workdir} started from {kept or 'random parameters'}; leave it "
            "out to go on, or give another --workdir for a new run",
        )
    return _pinned(kept)


def _check_nothing_lost(run: Path, unfinished: list[Path]) -> None:
    """Raises ValueError if a run without a whole checkpoint has had one, as far as can be seen.

    A run that was killed before its first checkpoint was whole has metrics, but also a folder `checkpoints/`, made
    before them, in which no folder has a step's name. It begins anew.
    """
    metrics = run / "metrics.jsonl"
    if not (metrics.is_file() and metrics.stat().st_size):
        return
    way_on = f"put it back, choose another --workdir, or remove {metrics} to begin anew"
    check((run / "checkpoints").is_dir(), f"{run / 'checkpoints'} is missing, but {metrics} holds a run; {way_on}")
    check(
        not unfinished, f"{', '.join(map(str, unfinished))} is not a whole checkpoint, and {run} has no other; {way_on}"
    )


def check_same(saved: Config, now: Config) -> None:
    """Raises ValueError naming the first field outside `FREE` that differs, with both values."""
    before, after = _flat(json.loads(to_json(saved))), _flat(json.loads(to_json(now)))
    for name, value in before.items():
        if not any(name == free or name.startswith(free + ".") for free in FREE):
            check(
                after[name] == value,
                f"{name} is {after[name]}, but the run in {saved.workdir} was started with {value}; "
                "give that value, or another --workdir for a new run",
            )


def write_config(run: Path, config: Config) -> None:
    """Writes config.json so that a reader finds the old one or the new one, never half of one."""
    partial = run / "config.json.tmp"
    partial.write_text(to_json(config) + "\n", encoding="utf-8")
    os.replace(partial, run / "config.json")


def keep_tokenizer(run: Path, save: Callable[[Path], object]) -> None:
    """Lets `save` write the run's tokenizer/ : whole or absent, and never another than the run began with.

    Raises ValueError if the run already has a tokenizer and it is not this one.
    """
    kept, partial = run / "tokenizer", run / "tokenizer.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save(partial)
    if whole_steps(run) and kept.exists():
        same = _contents(kept) == _contents(partial)
        shutil.rmtree(partial)
        check(same, f"the tokenizer in {kept} is not the one that the data now give: has data.source changed?")
        return
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(partial, kept)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}


def check_shapes(expected: dict, found: dict, run: Path) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown, or of another shape than expected."""
    want, have = _flat(expected), _flat(found)
    for name in sorted(set(want) | set(have)):
        check(name in have, f"the checkpoint in {run} lacks the parameter {name} of the config")
        check(name in want, f"the checkpoint in {run} holds a parameter {name} that the config does not know")
        check(
            tuple(want[name]) == tuple(have[name]),
            f"the parameter {name} in {run} has the shape {tuple(have[name])}, the config says {tuple(want[name])}",
        )


def _in_slices(params: dict) -> ocp.args.StandardSave:
    """Stores large stacked weights in chunks of one layer, and of one expert: a reader of a slice reads no more."""

    def leaf(path: tuple, array: jax.Array) -> ocp.SaveArgs:
        part, name = (key.key for key in path)
        axes = (0, 1) if parameters.letters(name)[0] == "E" else (0,)
        if part in ("embed", "head") or array.nbytes < _WORTH_SLICING:
            return ocp.SaveArgs()
        size = array.nbytes // math.prod(array.shape[axis] for axis in axes)
        return ocp.SaveArgs(chunk_byte_size=size, shard_axes=axes)

    return ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(leaf, params))
