"""How the decode kernel splits a call into jobs.

A job is one token, or a block of consecutive tokens of one sequence. Letters as in pages.py; J jobs, S streams.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.latent_attention.pages import Sequences, token_slots

_SMEM = 2**20 - 2**14  # bytes of scalar memory: every chip has 1 MiB, and the compiler reserves a part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """Pages of a chunk, streams that advance together, and tokens of a prefill job.

    Prefill jobs use half the pages, and one stream.
    """

    pages: int
    streams: int
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.pages < 1 or self.streams < 1:
            raise ValueError(f"pages and streams must be at least 1 and tokens at least 2: {self}")


class DecodeGrid(NamedTuple):
    """How one kernel call splits the work: as `DecodeBlocks`, `streams` on each of `cores`."""

    pages: int
    streams: int
    tokens: int
    cores: int


class Jobs(NamedTuple):
    """The jobs of one kernel call, int32 in scalar memory: stream s runs jobs bounds[s] to bounds[s + 1] - 1."""

    first_J: Any  # the job's first token
    count_J: Any  # its number of tokens
    sequence_J: Any  # its row of the page table
    visible_J: Any  # slots that its last token sees
    bounds_S1: Any
    steps_S: Any  # chunks of all jobs of a stream


def make_jobs(sequences: Sequences, t: int, slots: int, grid: DecodeGrid) -> Jobs:
    """The jobs of one kernel call of t tokens, with chunks of `slots` slots.

    With grid.tokens 1 these are the sequences with one query, and padding. Otherwise they are blocks of the other
    queries.
    """
    lengths_N, starts_N1, tokens = sequences.lengths_N, sequences.each_start(), grid.tokens
    rows = token_slots(sequences, t)
    n_T, rows_T = rows.sequence_T, jnp.arange(t, dtype=jnp.int32)
    alone_T = ~rows.real_T | (starts_N1[n_T + 1] - starts_N1[n_T] == 1)
    begins_T = alone_T if tokens == 1 else ~alone_T & ((rows_T - starts_N1[n_T]) % tokens == 0)
    j = t if tokens == 1 else min(t, t // tokens + lengths_N.shape[0])
    (first_J,) = jnp.nonzero(begins_T, size=j + 1, fill_value=t)  # one more: the kernel looks one job ahead
    row_J = jnp.minimum(first_J, t - 1)
    n_J, real_J = n_T[row_J], rows.real_T[row_J]
    count_J = jnp.where(real_J, jnp.minimum(tokens, starts_N1[n_J + 1] - first_J), 1)
    visible_J = jnp.where(real_J, rows.slot_T[row_J] + count_J, 0)
    chunks_J = jnp.where(first_J < t, jnp.maximum(1, -(-visible_J // slots)), 0)
    before_J = jnp.cumsum(chunks_J) - chunks_J
    streams = grid.streams * grid.cores
    shares_S1 = -(-jnp.sum(chunks_J) * jnp.arange(streams + 1) // streams)
    bounds_S1 = jnp.searchsorted(before_J, shares_S1, side="left")
    steps_S = jnp.diff(before_J[bounds_S1])
    jobs = Jobs(*(x.astype(jnp.int32) for x in (first_J, count_J, n_J, visible_J, bounds_S1, steps_S)))
    return jobs._replace(sequence_J=jobs.sequence_J % len(sequences.table_NP))


def check_scalars(table_NP: Array, tokens: int) -> None:
    """Raises ValueError if the page table and the jobs of `tokens` tokens do not fit the scalar memory."""
    rows, pages = table_NP.shape
    if _scalars(tokens, rows, pages) > _SMEM:
        raise ValueError(
            f"{tokens} tokens and a page table of {rows} x {pages} pages do not fit the kernel's scalar memory: "
            f"it holds {max_sequences(pages, tokens - rows)} such sequences"
        )


def max_sequences(pages: int, tokens: int) -> int:
    """The maximum number of sequences of `pages` pages, with one token each, in a call with `tokens` other tokens."""
    return max(0, (_SMEM - _scalars(tokens, 0, 0)) // _scalars(1, 1, pages))


def _scalars(tokens: int, sequences: int, pages: int) -> int:
    """Bytes of scalar memory: the page table, and four numbers for each of at most `tokens` jobs."""
    return 4 * (sequences * pages + 4 * tokens)
