"""Checks that all sections of the config share."""

import dataclasses
import math
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message), which reports a user's mistake, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_finite(value: Any, name: str = "") -> None:
    """Raises ValueError for a setting at any depth that is NaN or infinite, which most comparisons do not catch."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_finite(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for one in value:
            check_finite(one, name)
    elif isinstance(value, float):
        check(math.isfinite(value), f"{name} must be a finite number, not {value}")
