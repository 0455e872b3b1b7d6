"""Tests the Python program in a model's answer, in the sandbox."""

import re

from dsv2_jax.sandbox import supervisor

_PYTHON = ("", "python", "python3", "py")  # tags of code blocks


def program_in(text: str) -> str:
    """The last Python code block of a Markdown text, closed or not; all of the text if it has none."""
    text = text.replace("\r\n", "\n")
    blocks = re.findall(r"```([^\n`]*)\n(.*?)(?:```|\Z)", text, re.DOTALL)
    programs = [program for tag, program in blocks if tag.strip().lower() in _PYTHON]
    return programs[-1] if programs else text


def solves(text: str, tests: str, *, seconds: float) -> bool:
    """Whether the program in a text passes `tests`, Python source that runs after it and raises on failure.

    Program and tests together have `seconds`. Raises RuntimeError as `supervisor.judge` does.
    """
    return supervisor.judge(program_in(text), tests, seconds=seconds).code == 0
