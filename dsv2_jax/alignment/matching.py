"""Whether a text has a form. A worker of the sandbox runs this file, since a pattern can take time without end."""

import re


def matches(pattern: str, text: str) -> bool:
    """Whether the regular expression `pattern` matches all of `text`; its dot also matches the ends of lines."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None
