"""The folder of a run: its layout, its config, and the checks when a run starts or continues in it.

config.json            the run's config; `init` names the exact step that the run started from
init_digest            a digest of the parameters that the run started from, if it has an init
tokenizer/             its tokenizer
checkpoints/<step>/    params, optimizer, data (state of the input pipeline), progress (step and tokens), and
                       checksums of all of these, which are verified on restore (`checkpoint.py`)
lease                  names the process that trains here; empty when none does (`lease.py`)
metrics.jsonl          one line per log or evaluation           tensorboard/   the same for TensorBoard
plots/                 PNG files, drawn when the run finishes
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv2_jax.config import Config, check, from_json, to_json
from dsv2_jax.parallel import processes

# Settings that may change when a run continues: none of them changes what one step computes from the same state and
# batch. A larger `tokens` extends a finished run. It also moves the points of the schedule that are fractions of it.
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
_DIGEST = "init_digest"


def complete_steps(run: Path) -> list[int]:
    """The steps of the run's complete checkpoints, oldest first.

    Orbax renames a checkpoint to its step when all files are written. A folder with such a name but without metadata
    is a leftover of an interrupted copy or removal.
    """
    folders = (run / "checkpoints").glob("*")
    return sorted(int(f.name) for f in folders if f.name.isdigit() and (f / "params" / "_METADATA").is_file())


def latest_step(run: Path) -> int:
    """The step of the run's newest complete checkpoint. Raises FileNotFoundError if the folder holds none."""
    steps = complete_steps(run)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run}: a run's folder holds config.json and checkpoints/<step>/")
    return steps[-1]


def step_folder(run: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return run / "checkpoints" / str(step)


def locate(folder: Path) -> tuple[Path, int]:
    """The run and the step that a path names: a run's folder names its newest step, `RUN/checkpoints/<step>` that step.

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


def write_config(run: Path, config: Config) -> None:
    """Writes config.json atomically: a reader finds the old file or the new one."""
    partial = run / "config.json.tmp"
    partial.write_text(to_json(config) + "\n", encoding="utf-8")
    os.replace(partial, run / "config.json")


def open_run(config: Config) -> Config:
    """Creates the run's folder and writes config.json, or checks that this config can continue the existing run.

    Returns the config with its `init` pinned to a step: a run's folder is replaced by its newest step when the new run
    begins, and later continuations keep that step. Raises ValueError if a field outside `FREE` differs from the saved
    config, if there is a run and `config.resume` is off, and for a run whose checkpoints are lost.
    """
    run, steps = config.workdir, complete_steps(config.workdir)
    others = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit() and int(path.name) not in steps]
    if steps:
        check(config.resume, f"{run} already holds a run; give another --workdir, or drop --no-resume to continue it")
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
        for path in others:  # Orbax would count them as checkpoints and skip saves before their step
            print(f"{path} is an incomplete checkpoint; renamed to {path.name}.unfinished", file=sys.stderr, flush=True)
            path.rename(path.with_name(f"{path.name}.unfinished"))
        write_config(run, config)
    return config


def keep_init_digest(run: Path, digest: str) -> None:
    """Stores the digest of the parameters that the run starts from, or compares it with the stored digest.

    Raises ValueError if they differ, because then the checkpoint that the run started from has been overwritten.
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


def keep_tokenizer(run: Path, save: Callable[[Path], object]) -> None:
    """Writes the run's tokenizer/ with `save`, atomically.

    Raises ValueError if the run continues and already has a different tokenizer.
    """
    kept, partial = run / "tokenizer", run / "tokenizer.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save(partial)
    if complete_steps(run) and kept.exists():
        same = _contents(kept) == _contents(partial)
        shutil.rmtree(partial)
        check(same, f"the tokenizer in {kept} differs from that of the present data: has data.source changed?")
        return
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(partial, kept)


def check_same(saved: Config, now: Config) -> None:
    """Raises ValueError naming the first field outside `FREE` that differs, with both values."""
    before, after = flat(json.loads(to_json(saved))), flat(json.loads(to_json(now)))
    for name, value in before.items():
        if not any(name == free or name.startswith(free + ".") for free in FREE):
            check(
                after[name] == value,
                f"{name} is {after[name]}, but the run in {saved.workdir} was started with {value}; "
                "give that value, or another --workdir for a new run",
            )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their path: {"a": {"b": 1}} gives {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}


def _pinned(init: Path | None) -> Path | None:
    """For a run's folder, `checkpoints/<step>` of the newest step that the first process finds; else the path."""
    if init is None or not (init / "checkpoints").is_dir():
        return init
    return step_folder(init, int(processes.gathered(np.asarray(latest_step(init)))[0]))


def _kept_init(saved: Config, given: Path | None) -> Path | None:
    """The init of a run that continues: its own. Raises ValueError if another one is given."""
    kept = saved.init
    if given is not None:
        names = [] if kept is None else [kept, kept.parent.parent] if kept.parent.name == "checkpoints" else [kept]
        check(
            given.resolve() in [name.resolve() for name in names],
            f"--init is {given}, but the run in {saved.workdir} started from {kept or 'random parameters'}; drop "
            "--init to continue it, or give another --workdir for a new run",
        )
    return _pinned(kept)


def _check_nothing_lost(run: Path, unfinished: list[Path]) -> None:
    """Raises ValueError if a run without a complete checkpoint seems to have lost one.

    A run that was killed before its first complete checkpoint has metrics and a folder `checkpoints/`, created before
    them, without a folder named by a step. Such a run starts over.
    """
    metrics = run / "metrics.jsonl"
    if not (metrics.is_file() and metrics.stat().st_size):
        return
    remedy = f"put it back, give another --workdir, or remove {metrics} to start over"
    check((run / "checkpoints").is_dir(), f"{run / 'checkpoints'} is missing, but {metrics} belongs to a run; {remedy}")
    check(
        not unfinished,
        f"incomplete checkpoints {', '.join(map(str, unfinished))}, and {run} has no complete one; {remedy}",
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
