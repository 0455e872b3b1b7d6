"""Loops whose turns do not depend on each other, cut into parts that run side by side.

XLA on CPU runs the turns of one loop in order, and their products are too small to be worth sharing; independent loops
it runs at the same time.
"""

import itertools

from dsv2_jax.parallel.mesh import platform

_STREAMS = 2  # the same on every machine, so that sums are, too


def ranges(turns: int) -> list[tuple[int, int]]:
    """The turns 0 to `turns` - 1 as (start, stop) of each part, of even length: one part but on CPU."""
    parts = min(_STREAMS if platform() == "cpu" else 1, turns)
    edges = [turns * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))
