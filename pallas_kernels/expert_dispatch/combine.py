"""Adds up each token's rows, by one gather into token order and one grouped product.

A gather for each of a token's K choices would read and write K rows per token, but a device computes only a few of
them. This module gathers only the kept rows. The rows of a group of tokens are then adjacent, and a product with a 0/1
matrix adds them up on the MXU, in float32.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.expert_dispatch.weight_gradient import tgmm

RUN = 256  # tokens of a group; each core of a v5p computes half of them


def combine(y_PD: Array, row_NK: Array, kept_NK: Array) -> Array:
    """y[n] = sum over the kept k of y_PD[row_NK[n, k]]: [N, D] in y's dtype, sums in float32, 0 where none is kept.

    row_NK int32, below P; no two kept pairs share a row. Rows of no kept pair may have any values, even NaN.
    """
    n, k = row_NK.shape
    runs = -(-n // RUN)
    kept_P = kept_NK.reshape(-1)
    pair_P = jnp.argsort(~kept_P, stable=True)[: y_PD.shape[0]].astype(jnp.int32)  # the kept ones first, by token
    rows_PD = y_PD.at[row_NK.reshape(-1)[pair_P]].get(mode="promise_in_bounds")
    own_PT = ((pair_P // k)[:, None] % RUN == jnp.arange(RUN)).astype(y_PD.dtype)
    sizes_R = jnp.pad(kept_NK.sum(axis=1, dtype=jnp.int32), (0, runs * RUN - n)).reshape(runs, RUN).sum(axis=1)
    return add_up(own_PT, rows_PD, sizes_R).reshape(runs * RUN, -1)[:n]


def add_up(own_PT: Array, rows_PD: Array, sizes_R: Array) -> Array:
    """The kernel alone: [R, RUN, D]. own_PT: 1 at the row's token within its group, else 0."""
    return tgmm(own_PT, rows_PD, sizes_R, name="combine")
