"""Whether two answers of maths are equal, by math-verify. A worker of the sandbox runs this file.

math-verify passes parts of a text, digits and operators only, to sympy's `parse_expr`, which evaluates them: no code
comes from that, but numbers of any size do, and a process of its own has limits of time and memory.
"""

import math_verify

_SECONDS = 2  # of each step in Python; a long one in C is ended from outside


def equal(answer: str, response: str) -> bool:
    """Whether the last answer in `response` (a boxed one, a formula or a number) equals that in `answer`."""
    given = math_verify.parse(response, parsing_timeout=_SECONDS)
    gold = math_verify.parse(answer, parsing_timeout=_SECONDS)
    return bool(given) and math_verify.verify(gold, given, timeout_seconds=_SECONDS)
