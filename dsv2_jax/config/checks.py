"""Checks that every section of the settings shares."""

import dataclasses
import math
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds: a user's mistake, told in plain words."""
    if not condition:
        raise ValueError(message)


def check_finite(value: Any, name: str = "") -> None:
    """Raises ValueError naming a setting, however deep, that is NaN or infinite: most comparisons let these through."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_finite(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for one in value:
            check_finite(one, name)
    elif isinstance(value, float):
        check(math.isfinite(value), f"{name} must be a finite number, not {value}")
