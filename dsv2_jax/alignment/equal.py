"""Compares two maths answers by math-verify. A worker of the sandbox runs this file.

math-verify passes parts of a text, digits and operators only, to sympy's `parse_expr`, which evaluates them. That
cannot run code, but it can compute numbers of any size, so it runs in a process with limits on time and memory.
"""

import math_verify

_SECONDS = 2  # timeout of a step in Python; the parent process ends a long step in C


def equal(answer: str, response: str) -> bool:
    """Whether the last answer in `response` (a boxed one, a formula or a number) equals that in `answer`."""
    given = math_verify.parse(response, parsing_timeout=_SECONDS)
    gold = math_verify.parse(answer, parsing_timeout=_SECONDS)
    return bool(given) and math_verify.verify(gold, given, timeout_seconds=_SECONDS)
