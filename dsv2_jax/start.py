"""The config of a training run: the preset, then with `--init` the checkpoint's model section, then the flags.

Parameters are valid only with the model section that they were trained with, because RoPE, scales and routing are
settings. So the model section comes from the checkpoint, except for fields that the preset's stage changes
(`configs.SETS`) and fields of training (`TRAINING`). A run that continues uses its own saved config.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dsv2_jax import cli
from dsv2_jax.config import Config, Model, Moe, check

# Fields of the model section that a stage may change. If a preset names one in configs.SETS, its value replaces the
# checkpoint's.
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
# Fields of the model section that affect training but not what the model computes; always the preset's. They depend on
# batch and mesh, and a Hugging Face config.json does not have them. It has expert_balance, its aux_loss_alpha.
TRAINING = (
    *(f"moe.{name}" for name in Moe.balances() if name != "expert_balance"),
    "moe.capacity_factor",
    "moe.exempt_fraction",
    "moe.budget_sequences",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Where:
    """The flags that select the source of the model section."""

    workdir: Path
    init: Path | None


def configure(preset: Config, flags: Sequence[str], sets: Sequence[ModelField], prog: str) -> tuple[Config, list[str]]:
    """The config of a preset and flags; with `--init` also lines that list changes to the checkpoint's model section.

    sets: the fields whose preset values replace those of the model section of `--init`. Exits with one line and code 2
    for wrong flags. Raises ValueError for a field that changes the parameters' shapes, and as `loading.load` does for
    an `--init` that is not a checkpoint.
    """
    if {"-h", "--help"} & set(flags):
        return cli.parse(preset, flags, prog), []
    where = cli.known(_Where(workdir=preset.workdir, init=preset.init), flags, prog)
    saved = _saved(where.workdir)
    if saved is not None and saved.init is not None:
        return cli.parse(preset, [f"--init={saved.init}", *_as_flags(_fields(saved.model)), *flags], prog), []
    if where.init is None:
        return cli.parse(preset, flags, prog), []

    from dsv2_jax import hf, loading  # take seconds to import

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
    """The saved config of the run that would continue in this folder, or None."""
    if not (run / "config.json").is_file():
        return None
    from dsv2_jax.training import run_folder

    return run_folder.read_config(run) if run_folder.complete_steps(run) else None


def _check_shapes(there: Model, here: Model, changed: dict[str, Any], init: Path) -> None:
    """Raises ValueError naming the changed fields that change parameter shapes; a score head may replace the logits."""
    from dsv2_jax import parameters

    starts = dataclasses.replace(there, head=here.head) if here.head == "score" else there
    if parameters.tree(starts) == parameters.tree(here):
        return
    names = [name for name, value in changed.items() if _reshapes(starts, name, value)] or changed
    listed = ", ".join(f"model.{name} {changed[name]} in place of {_fields(there)[name]}" for name in names)
    check(False, f"{listed}: the parameters in {init} have other shapes; keep the checkpoint's value")


def _reshapes(model: Model, name: str, value: Any) -> bool:
    """Whether this one change gives some parameter another shape."""
    from dsv2_jax import parameters

    with contextlib.suppress(ValueError):  # invalid without the other changes
        return parameters.tree(_replaced(model, name, value)) != parameters.tree(model)
    return False


def _fields(section: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a dataclass and its nested sections: {"rope.factor": 40.0, ...}."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= _fields(value, f"{prefix}{field.name}.") if inner else {f"{prefix}{field.name}": value}
    return found


def _replaced(section: Any, name: str, value: Any) -> Any:
    """The dataclass with a new value of the field `name`, in the notation of `_fields`."""
    field, _, rest = name.partition(".")
    return dataclasses.replace(section, **{field: _replaced(getattr(section, field), rest, value) if rest else value})


def _as_flags(fields: dict[str, Any]) -> list[str]:
    """The fields as flags. They precede the user's flags, which win, so only the combined config is checked."""
    return [f"--model.{name}={value}" for name, value in fields.items()]
