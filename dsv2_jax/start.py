"""The config of a training run: the preset's, with `--init` the checkpoint's model section, and the flags over both.

A checkpoint's parameters mean something only under the model section that they were trained with: RoPE, scales and
routing are no parameters. So it comes from the checkpoint whole, but for what the preset's stage is about
(`configs.SETS`) and for how a stage trains (`TRAINING`). A run that goes on has its own, whatever became of its init.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dsv2_jax import cli
from dsv2_jax.config import Config, Model, check

# Fields of the model section that a stage can be about. Those that a preset names in configs.SETS it sets over the
# model of --init; all others are then the checkpoint's.
ModelField = Literal[
    "head",
    "max_position_embeddings",
    "rope.kind",
    "rope.factor",
    "rope.beta_slow",
    "rope.beta_fast",
    "rope.mscale",
    "rope.mscale_all_dim",
]
# Fields of the model section that say how a stage trains and not what the model computes: always the preset's. No
# config.json of Hugging Face's carries them, and they depend on batch and mesh.
TRAINING = (
    "moe.device_balance",
    "moe.communication_balance",
    "moe.capacity_factor",
    "moe.exempt_fraction",
    "moe.budget_sequences",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Where:
    """The flags that decide where the model section comes from."""

    workdir: Path
    init: Path | None


def configure(preset: Config, flags: Sequence[str], sets: Sequence[ModelField], prog: str) -> tuple[Config, list[str]]:
    """The config that a preset and its flags ask for; and with `--init`, lines that say how the model departs from it.

    sets: what the preset sets in the model section of `--init`. Ends with one line and exit code 2 where flags are
    wrong. Raises ValueError where a field would give the checkpoint's parameters other shapes, and as `loading.load`
    does for an `--init` that is no checkpoint.
    """
    if {"-h", "--help"} & set(flags):
        return cli.parse(preset, flags, prog), []
    where = cli.known(_Where(workdir=preset.workdir, init=preset.init), flags, prog)
    saved = _saved(where.workdir)
    if saved is not None and saved.init is not None:
        return cli.parse(preset, [f"--init={saved.init}", *_as_flags(_fields(saved.model)), *flags], prog), []
    if where.init is None:
        return cli.parse(preset, flags, prog), []

    from dsv2_jax import hf, loading  # they take seconds, which no other mistake has to wait for

    there = loading.model_of(where.init)
    theirs = {name: value for name, value in _fields(there).items() if name not in (*sets, *TRAINING)}
    config = cli.parse(preset, [*_as_flags(theirs), *flags], prog)
    silent = TRAINING if hf.is_hf(where.init) else ()
    before, after = _fields(there), _fields(config.model)
    changed = {name: after[name] for name in before if after[name] != before[name] and name not in silent}
    _check_shapes(there, config.model, changed, where.init)
    lines = [f"model.{name} is {value}, in place of the checkpoint's {before[name]}" for name, value in changed.items()]
    return config, [f"model section as in {where.init}{', but:' if lines else ''}", *lines]


def _saved(run: Path) -> Config | None:
    """The config of the run that would go on in this folder, if there is one."""
    if not (run / "config.json").is_file():
        return None
    from dsv2_jax.training import checkpoint

    return checkpoint.read_config(run) if checkpoint.whole_steps(run) else None


def _check_shapes(there: Model, here: Model, changed: dict[str, Any], init: Path) -> None:
    """Raises ValueError naming the changed fields that give parameters other shapes; a score may replace the logits."""
    from dsv2_jax import parameters

    starts = dataclasses.replace(there, head=here.head) if here.head == "score" else there
    if parameters.tree(starts) == parameters.tree(here):
        return
    blamed = [name for name, value in changed.items() if _reshapes(starts, name, value)]
    told = ", ".join(f"model.{name} {changed[name]} in place of {_fields(there)[name]}" for name in blamed or changed)
    check(False, f"{told}: with that the parameters in {init} would have other shapes; leave the checkpoint's")


def _reshapes(model: Model, name: str, value: Any) -> bool:
    from dsv2_jax import parameters

    with contextlib.suppress(ValueError):  # not valid without the other changes: not the one to blame
        return parameters.tree(_replaced(model, name, value)) != parameters.tree(model)
    return False


def _fields(section: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a dataclass and of the sections in it: {"rope.factor": 40.0, ...}."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= _fields(value, f"{prefix}{field.name}.") if inner else {f"{prefix}{field.name}": value}
    return found


def _replaced(section: Any, name: str, value: Any) -> Any:
    """The dataclass with another value of the field `name`, a name of `_fields`."""
    field, _, rest = name.partition(".")
    return dataclasses.replace(section, **{field: _replaced(getattr(section, field), rest, value) if rest else value})


def _as_flags(fields: dict[str, Any]) -> list[str]:
    """Flags that stand before the user's own, which win: only what comes of all of them has to pass the checks."""
    return [f"--model.{name}={value}" for name, value in fields.items()]
