"""What there is to price and to tune: each op with its shapes, its useful work, and how to call it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import shapes, tuning
from pallas_kernels.chips import CHIPS
from pallas_kernels.latent_attention import decode_kernel

_BF16 = 2  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An op: `build(shape, chip, blocks)` gives a function and its arguments, for `cost.cost`."""

    shapes: Mapping[str, Any]
    build: Callable[[Any, str, Any], tuple[Callable, tuple]]
    flops: Callable[[Any], float]  # useful ones, of the whole chip
    bytes: Callable[[Any], float]  # that have to move between HBM and the chip, each once
    key: Callable[[Any], Any]  # the shape as tuning.py's table lists it
    blocks: Callable[[str, Any], Any]  # what tuning.py says, for a chip and a shape
    candidates: Callable[[Any], Iterable[Any]]  # what there is to try, smaller blocks first


def _latent_decode(shape: shapes.LatentDecode, chip: str, blocks: Any) -> tuple[Callable, tuple]:
    n, pages = shape.sequences, -(-shape.length // shape.page)

    def bf16(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    def run(*args: jax.Array) -> jax.Array:
        return decode_kernel.decode(*args, scale=1.0, blocks=blocks, cores=CHIPS[chip].cores)

    return run, (
        bf16(n, shape.heads, shape.latent),
        bf16(n, shape.heads, shape.rope),
        bf16(n * pages, shape.page, shape.latent),
        bf16(n * pages, shape.rope, shape.page),
        np.random.default_rng(0).permutation(n * pages).astype(np.int32).reshape(n, pages),
        np.full(n, shape.length, np.int32),
        np.arange(n + 1, dtype=np.int32),
    )


def _latent_decode_bytes(shape: shapes.LatentDecode) -> float:
    cache = shape.length * (shape.latent + shape.rope)
    queries_and_results = shape.heads * (2 * shape.latent + shape.rope)
    return _BF16 * shape.sequences * (cache + queries_and_results)


def _latent_decode_candidates(shape: shapes.LatentDecode) -> Iterable[Any]:
    chunks = {min(shape.length, slots) // shape.page for slots in (1024, 2048, 4096)}
    for pages, streams in itertools.product(sorted(chunks), (1, 2)):
        yield decode_kernel.Blocks(pages=pages, streams=streams, tokens=max(2, min(16, 512 // shape.heads)))


OPS: dict[str, Op] = {
    "latent_decode": Op(
        shapes=shapes.LATENT_DECODE,
        build=_latent_decode,
        flops=lambda s: 2 * s.sequences * s.heads * s.length * (2 * s.latent + s.rope),
        bytes=_latent_decode_bytes,
        key=lambda s: (s.heads, s.page),
        blocks=lambda chip, s: tuning.latent_decode(chip, s.heads, s.page),
        candidates=_latent_decode_candidates,
    ),
}
