"""The keys that a query sees, for both passes: those of its own segment up to its own slot; segment 0 is padding.

Scores are [keys, queries]. Letters: B batch, T queries, S keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.common import LANES

_NOBODY = 1 << 30


class FlashBlocks(NamedTuple):
    """Block sizes of one pass.

    queries: of a grid step. chunk: keys that VMEM holds. keys: of a step of the inner loop. part: queries or keys of a
    masked product. ones: whether the MXU sums the weights, by rows of ones below the values, where it has spare rows.
    """

    queries: int
    chunk: int
    keys: int
    part: int
    ones: bool


class SegmentBounds(NamedTuple):
    """Segments of each block, flat over (sequence, block), in scalar memory.

    low, high: the smallest and the largest segment except padding. only: the block's segment if it has a single one and
    no padding, else -1.
    """

    low: Any
    high: Any
    only: Any

    def at(self, i: Array) -> "SegmentBounds":
        return SegmentBounds(self.low[i], self.high[i], self.only[i])


class Scalars(NamedTuple):
    """A kernel's scalar memory. queries, keys: segments of each block of queries and of each part of keys.

    offset [1]: slot of the first query. chunk [1]: the chunk of keys of this call, for the backward pass alone.
    """

    offset: Any
    chunk: Any
    queries: SegmentBounds
    keys: SegmentBounds


def bounds(segments: Array, block: int) -> SegmentBounds:
    """Bounds of each block of segments [B, T]; the block size divides T."""
    blocks = segments.reshape(-1, block)
    low = jnp.min(jnp.where(blocks > 0, blocks, _NOBODY), axis=1)
    high = jnp.max(blocks, axis=1)
    single = (low == high) & (jnp.min(blocks, axis=1) > 0)
    return SegmentBounds(low, high, jnp.where(single, low, -1))


def meet(queries: SegmentBounds, keys: SegmentBounds) -> Array:
    """Whether both blocks may have a segment in common; never false if they have."""
    return (queries.low <= keys.high) & (keys.low <= queries.high)


def same(queries: SegmentBounds, keys: SegmentBounds) -> Array:
    """Whether both blocks have only one segment, the same, and so need no mask by segment."""
    return (queries.only == keys.only) & (queries.only > 0)


def mask(segments_keys: Array, segments_queries: Array, ahead: Array) -> Array:
    """[keys, queries]: whether the query sees the key. ahead: slot of the first query minus slot of the first key.

    segments_keys: [keys, LANES], equal columns. segments_queries: [1, queries], a multiple of LANES.
    """
    keys, queries = segments_keys.shape[0], segments_queries.shape[1]
    last = lax.broadcasted_iota(jnp.int32, (1, queries), 1) + ahead
    causal = lax.broadcasted_iota(jnp.int32, (keys, queries), 0) <= last
    real = jnp.where(segments_queries > 0, segments_queries, -1)
    return causal & (jnp.tile(segments_keys, (1, queries // LANES)) == real)


def mask_corner(x: Array) -> Array:
    """x [keys, queries] with its last square block set to 0 below the diagonal, where the key comes after the query."""
    size = x.shape[1]
    start = x.shape[0] - size
    causal = lax.broadcasted_iota(jnp.int32, (size, size), 0) <= lax.broadcasted_iota(jnp.int32, (size, size), 1)
    last = jnp.where(causal, x[start:], 0)
    return jnp.concatenate([x[:start], last]) if start else last


class Place(NamedTuple):
    """The slots of a grid step's first query and first key, and the segments of both."""

    first: Array
    start: Array
    queries: SegmentBounds
    keys: Callable[[Array], SegmentBounds]  # of a part of the chunk, by its number
    visible: Array  # blocks of the chunk that the last query sees

    @property
    def ahead(self) -> Array:
        """How many keys of the chunk come before the first query."""
        return self.first - self.start


def place(scalars: Scalars, batch: Array, i: Array, chunk: Any, counts: tuple, blocks: FlashBlocks) -> Place:
    """The place of query block i. chunk: None for `scalars.chunk`. counts: a sequence's query blocks and chunks."""
    offset = scalars.offset[0]
    if chunk is None:
        chunk = scalars.chunk[0]
    first, start = offset + i * blocks.queries, chunk * blocks.chunk
    parts = blocks.chunk // blocks.part
    return Place(
        first,
        start,
        scalars.queries.at(batch * counts[0] + i),
        lambda part: scalars.keys.at((batch * counts[1] + chunk) * parts + part),
        jnp.clip(pl.cdiv(first + blocks.queries - start, blocks.keys), 0, blocks.chunk // blocks.keys),
    )


def walk(here: Place, blocks: FlashBlocks, add: Callable, triangle: Callable) -> None:
    """Visits the keys of the chunk that these queries see. Skips blocks beyond the diagonal or of other segments.

    add(at, keys, skip, masked): `keys` keys from `at` on, for all queries but the first `skip`.
    triangle(at): as many keys as queries, all of one segment; the first key and the first query have the same slot.
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
        visible = one & (at + blocks.keys - 1 <= here.ahead)
        done = visible
        pl.when(visible)(functools.partial(add, at, blocks.keys, 0, False))
        if blocks.keys == blocks.queries:
            diagonal = one & (at == here.ahead)
            pl.when(diagonal)(functools.partial(triangle, at))
            done = visible | diagonal
        for p in parts:
            pl.when(jnp.logical_not(done) & meet(here.queries, keys[p]))(
                functools.partial(part, pl.multiple_of(at + p * blocks.part, blocks.part))
            )

    lax.fori_loop(0, here.visible, step, None)
