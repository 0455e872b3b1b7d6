"""Config dataclasses to JSON and back."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from dsv2_jax.config.checks import check

T = TypeVar("T")


def to_json(value: Any) -> str:
    """The dataclass as indented JSON: paths as strings, tuples as lists."""
    return json.dumps(dataclasses.asdict(value), indent=2, default=str)


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json` for the dataclass `kind`; a missing field takes its default (see config/__init__.py).

    Raises ValueError naming unknown fields, and missing ones without a default.
    """
    return _build(kind, json.loads(text), kind.__name__)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _build(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        check(isinstance(value, dict), f"{where} must be an object")
        unknown = sorted(set(value) - set(hints))
        check(not unknown, f"{where} has no field {', '.join(unknown)}")
        missing = sorted(f.name for f in dataclasses.fields(kind) if f.name not in value and _required(f))
        check(not missing, f"{where} lacks the field {', '.join(missing)}, which has no default")
        return kind(**{name: _build(hints[name], v, f"{where}.{name}") for name, v in value.items()})
    if Path in (kind, *typing.get_args(kind)):
        return None if value is None else Path(value)
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    return value
