"""Matches a text against a pattern. A worker of the sandbox runs this file, because a match can take unbounded time."""

import re


def matches(pattern: str, text: str) -> bool:
    """Whether the regular expression `pattern` matches all of `text`; a dot also matches newlines."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None
