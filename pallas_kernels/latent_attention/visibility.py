"""Which keys a query sees: causal by slot, equal segments, 0 is padding. What both passes of the kernel share.

Letters: B batch, T queries, S keys, I blocks of queries, C blocks of keys; scores are held as [keys, queries].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.constants import LANES

_NOBODY = 1 << 30


class Blocks(NamedTuple):
    """queries: of a grid step. chunk: keys held in VMEM. keys: of a step of the inner loop. part: where masked.

    ones: whether the MXU adds up the weights, by rows of ones below the values: where it has rows to spare.
    """

    queries: int
    chunk: int
    keys: int
    part: int
    ones: bool


class Bounds(NamedTuple):
    """Segments of each block, flat over (sequence, block), for the scalar core.

    low, high: least and largest segment that is no padding. only: the segment all of the block belongs to, else -1.
    """

    low: Array
    high: Array
    only: Array

    def at(self, i: Array) -> "Bounds":
        return Bounds(self.low[i], self.high[i], self.only[i])


def bounds(segments: Array, block: int) -> Bounds:
    """Bounds of each `block` of segments [B, T]; block divides T."""
    blocks = segments.reshape(-1, block)
    low = jnp.min(jnp.where(blocks > 0, blocks, _NOBODY), axis=1)
    high = jnp.max(blocks, axis=1)
    whole = (low == high) & (jnp.min(blocks, axis=1) > 0)
    return Bounds(low, high, jnp.where(whole, low, -1))


def work(products: int, arrays: Any) -> pl.CostEstimate:
    """What XLA is told of a kernel, to schedule transfers beside it.

    products: multiplications if every query saw every key, of which causality leaves half. Each array moves once.
    """
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return pl.CostEstimate(flops=products, bytes_accessed=moved, transcendentals=0)


def meet(queries: Bounds, keys: Bounds) -> Array:
    """Whether a segment can lie in both blocks: never false for two that share one."""
    return (queries.low <= keys.high) & (keys.low <= queries.high)


def same(queries: Bounds, keys: Bounds) -> Array:
    """Whether all of both blocks is one segment: no mask by segment is needed."""
    return (queries.only == keys.only) & (queries.only > 0)


def mask(segments_keys: Array, segments_queries: Array, ahead: Array) -> Array:
    """[keys, queries]: who sees whom. ahead: slot of the first query less slot of the first key.

    segments_keys: [keys, LANES], every lane the same. segments_queries: [1, queries], a multiple of LANES.
    """
    keys, queries = segments_keys.shape[0], segments_queries.shape[1]
    last = lax.broadcasted_iota(jnp.int32, (1, queries), 1) + ahead
    causal = lax.broadcasted_iota(jnp.int32, (keys, queries), 0) <= last
    real = jnp.where(segments_queries > 0, segments_queries, -1)
    return causal & (jnp.tile(segments_keys, (1, queries // LANES)) == real)


def mask_corner(x: Array) -> Array:
    """x [keys, queries] with its last square set to 0 below the diagonal, where keys come after queries."""
    size = x.shape[1]
    start = x.shape[0] - size
    causal = lax.broadcasted_iota(jnp.int32, (size, size), 0) <= lax.broadcasted_iota(jnp.int32, (size, size), 1)
    last = jnp.where(causal, x[start:], 0)
    return jnp.concatenate([x[:start], last]) if start else last


class Place(NamedTuple):
    """Where a grid step stands: slots of its first query and first key, and the bounds of both.

    keys: of every part of the chunk. visible: how many blocks of the chunk its last query reaches.
    """

    first: Array
    start: Array
    queries: Bounds
    keys: Callable[[Array], Bounds]
    visible: Array

    @property
    def ahead(self) -> Array:
        """How many keys of the chunk come before the first query."""
        return self.first - self.start


def place(
    offset: Array, batch: Array, i: Array, chunk: Array, counts: tuple, queries: Bounds, keys: Bounds, blocks: Blocks
) -> Place:
    """counts: how many blocks of queries and how many chunks a sequence has."""
    first, start = offset + i * blocks.queries, chunk * blocks.chunk
    parts = blocks.chunk // blocks.part
    return Place(
        first,
        start,
        Bounds(*queries).at(batch * counts[0] + i),
        lambda part: Bounds(*keys).at((batch * counts[1] + chunk) * parts + part),
        jnp.clip(pl.cdiv(first + blocks.queries - start, blocks.keys), 0, blocks.chunk // blocks.keys),
    )


def walk(here: Place, blocks: Blocks, add: Callable, triangle: Callable) -> None:
    """Visits what these queries see of the chunk, and nothing that lies whole beyond the diagonal or in other segments.

    add(at, keys, skip, masked): `keys` keys from `at` on against the queries behind the first `skip`.
    triangle(at): as many keys as queries, all of one segment, the first of both in the same slot.
    """

    def part(at: Array) -> None:
        spans = blocks.queries // blocks.part
        unseeing = jnp.clip((at - here.ahead) // blocks.part, 0, spans)
        for span in range(spans):
            pl.when(unseeing == span)(functools.partial(add, at, blocks.part, span * blocks.part, True))

    def step(block: Array, _: None) -> None:
        at = pl.multiple_of(block * blocks.keys, blocks.keys)
        parts = range(blocks.keys // blocks.part)
        keys = [here.keys(block * len(parts) + p) for p in parts]
        one = functools.reduce(jnp.logical_and, (same(here.queries, x) for x in keys))
        whole = one & (at + blocks.keys - 1 <= here.ahead)
        done = whole
        pl.when(whole)(functools.partial(add, at, blocks.keys, 0, False))
        if blocks.keys == blocks.queries:
            diagonal = one & (at == here.ahead)
            pl.when(diagonal)(functools.partial(triangle, at))
            done = whole | diagonal
        for p in parts:
            pl.when(jnp.logical_not(done) & meet(here.queries, keys[p]))(
                functools.partial(part, pl.multiple_of(at + p * blocks.part, blocks.part))
            )

    lax.fori_loop(0, here.visible, step, None)
