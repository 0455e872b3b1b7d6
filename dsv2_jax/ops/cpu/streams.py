"""Loops with independent iterations, cut into parts that XLA's CPU backend runs at the same time.

The backend runs the iterations of one loop in order, and their products are too small to share among threads. It runs
independent loops concurrently.
"""

import itertools

from dsv2_jax.ops.switch import on_cpu

_STREAMS = 2  # fixed, so that sums are added in the same order on every machine


def ranges(iterations: int) -> list[tuple[int, int]]:
    """Iterations 0 to `iterations` - 1 as (start, stop) of each part, in even parts; one part unless on CPU."""
    parts = min(_STREAMS if on_cpu() else 1, iterations)
    edges = [iterations * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))
