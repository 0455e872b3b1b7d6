"""Constants, the type of a ref, and the cost estimate for XLA, which the kernels of both folders share."""

from typing import Any

import jax
from jax.experimental import pallas as pl

LANES = 128  # columns of a vector register: widths and tile sizes are multiples of it
MASKED = -1e30  # score of a key that a query may not see; finite, because the softmax of a row of -inf is NaN

Ref = Any  # memory that a kernel reads and writes like an array; Pallas has no public type for it


def cost_estimate(flops: int, arrays: Any) -> pl.CostEstimate:
    """A kernel's cost, by which XLA schedules overlapping transfers. arrays: a tree; each array moves once."""
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
