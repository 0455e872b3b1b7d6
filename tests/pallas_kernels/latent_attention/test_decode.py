"""Decode over a paged cache, kernel and plain twin, against float64: ragged lengths, page borders, NaN in slots."""

import functools
from collections.abc import Callable

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import Number, exact, product
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.latent_attention import (
    CachePages,
    Sequences,
    decode,
    decode_kernel,
    latent_decode,
    packing,
    reference,
)
from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks
from pallas_kernels.pricing import cost, shapes
from pallas_kernels.pricing.ops import OPS

C, R, K = 128, 64, 128
SCALE = 0.08


# Sequences as (filled slots, queries of this call). All cases have the same shapes, so they share a compilation.
CASES = {
    "one token each, uneven": [(300, 1), (5, 1), (1, 1), (256, 1), (511, 1)],
    "page borders": [(127, 1), (128, 1), (129, 1), (384, 1), (385, 1), (512, 1)],
    "a first prompt": [(21, 21)],
    "chunks and tokens": [(300, 9), (2, 1), (129, 2), (260, 1), (3, 3)],
    "sequences without queries": [(40, 0), (200, 1), (9, 0), (130, 5), (64, 0)],
    "only padding": [(64, 0)],
}
T, N, H, P = 22, 6, 4, 4


MIXED = ("page borders", "chunks and tokens", "only padding")
# Dtypes of queries and of the cache, and the cases: uint8 holds 6-bit integers.
CACHES = {
    (jnp.float32, jnp.float32): CASES,
    (jnp.bfloat16, jnp.bfloat16): CASES,
    (jnp.bfloat16, jnp.int8): MIXED,
    (jnp.bfloat16, jnp.uint8): MIXED,
}
STORED = {"latent_decode": jnp.bfloat16, "latent_decode_int8": jnp.int8, "latent_decode_int6": jnp.uint8}


def _rows(rng: np.random.Generator, slots: int, size: int, stored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as a cache stores them, their scales, and their values in float64."""
    if not packing.is_packed(stored):
        rows = np.asarray(rng.normal(size=(slots, size)), stored)
        return rows, np.zeros(slots, np.float16), rows.astype(np.float64)
    limit = 127 if stored == jnp.int8 else 31
    integers = rng.integers(-limit, limit + 1, (slots, size))
    scales = (rng.uniform(1, 2, slots) / limit).astype(np.float16)
    rows = (
        integers.astype(np.int8) if stored == jnp.int8 else np.asarray(packing.pack(jnp.asarray(integers, jnp.int32)))
    )
    return rows, scales, integers * scales.astype(np.float64)[:, None]


def _cache(rng: np.random.Generator, pages: int, stored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unwritten latents, rope keys and words of scales: NaN, or any bits."""
    sizes = (pages, K, packing.width(C, stored)), (pages, packing.width(R, stored), K)
    words_L1K = rng.integers(0, 2**32, (pages, 1, K), np.uint32)
    if not packing.is_packed(stored):
        return *(np.full(size, np.nan, stored) for size in sizes), words_L1K
    return *(rng.integers(0, 256, size, np.uint8).view(stored) for size in sizes), words_L1K


def _arrays(name: str, dtype, stored) -> tuple[tuple, jax.Array | None, Number]:
    """The op's arguments, with garbage in every slot of no sequence, and the true result with its bounds."""
    rng = np.random.default_rng(0)
    sequences = CASES[name] + [(0, 0)] * (N - len(CASES[name]))
    table_NP = rng.permutation(N * P + 2)[: N * P].reshape(N, P)
    latent_LKC, rope_LRK, words_L1K = _cache(rng, N * P + 2, stored)
    q_THC, q_THR = (np.asarray(rng.normal(size=(T, H, d)), dtype) for d in (C, R))
    o_THC = exact(np.zeros((T, H, C)))
    starts = np.cumsum([0] + [queries for _, queries in sequences])
    for (slots, queries), row, start in zip(sequences, table_NP, starts[:-1], strict=True):
        (rows_c, scales_c, c_SC), (rows_r, scales_r, r_SR) = (_rows(rng, slots, d, stored) for d in (C, R))
        words = scales_c.view(np.uint16) | scales_r.view(np.uint16).astype(np.uint32) << 16
        for s in range(slots):
            latent_LKC[row[s // K], s % K] = rows_c[s]
            rope_LRK[row[s // K], :, s % K] = rows_r[s]
            words_L1K[row[s // K], 0, s % K] = words[s]
        for i in range(queries):
            q_HC, q_HR = (exact(x[start + i]) for x in (q_THC, q_THR))
            seen = slots - queries + i + 1
            # Quantized rows may be rounded to the queries' dtype before the product.
            keys = (exact(x[:seen]).to(dtype) if packing.is_packed(stored) else exact(x[:seen]) for x in (c_SC, r_SR))
            c, r = keys
            scores = product("hc,sc->hs", q_HC, c) * exact(1.0) + product("hr,sr->hs", q_HR, r) * exact(1.0)
            p = bounds.softmax(scores * exact(SCALE), np.ones((H, seen), bool))
            o = product("hs,sc->hc", p.to(dtype), c).to(dtype)
            for part, own in zip(o_THC, o, strict=True):
                part[start + i] = own
    lengths = np.array([slots for slots, _ in sequences])
    integers = (jnp.asarray(x, jnp.int32) for x in (table_NP, lengths, starts))
    arrays = *map(jnp.asarray, (q_THC, q_THR, latent_LKC, rope_LRK)), *integers
    return arrays, jnp.asarray(words_L1K) if packing.is_packed(stored) else None, o_THC


def _grouped(run: Callable) -> Callable:
    """`run` with its arrays as separate arguments."""

    def call(q_THC, q_THR, latent_LKC, rope_LRK, table_NP, lengths_N, starts_N1, scales_L1K=None):
        pages, sequences = CachePages(latent_LKC, rope_LRK, scales_L1K), Sequences(table_NP, lengths_N, starts_N1)
        return run((q_THC, q_THR), pages, sequences, scale=SCALE)

    return call


@functools.cache
def _kernel(blocks: DecodeBlocks, interpret=True, cores: int = 1) -> Callable[..., jax.Array]:
    run = functools.partial(decode_kernel.decode, blocks=blocks, cores=cores, interpret=interpret)
    return jax.jit(_grouped(run))


@functools.cache
def _plain() -> Callable[..., jax.Array]:
    return jax.jit(_grouped(reference.latent_decode))


def _check(queries, pages, sequences, *, scale):
    """The op's checks alone."""
    del scale
    return decode.check(queries, pages, sequences)


@pytest.mark.parametrize(
    ("dtype", "stored", "name"), [(*cache, name) for cache, names in CACHES.items() for name in names]
)
def test_float64(dtype, stored, name: str) -> None:
    """Both agree with float64, and NaN does not spread. The bounds find a scale off by 1e-4 (bfloat16: 2e-2)."""
    arrays, scales, o_THC = _arrays(name, dtype, stored)
    kernel = _kernel(DecodeBlocks(pages=2, streams=1 if packing.is_packed(stored) else 2, tokens=4))
    for run in (_plain(), kernel):
        got = np.asarray(run(*arrays, scales_L1K=scales), np.float64)
        bounds.check(got, o_THC)
        assert np.abs(got - o_THC.value).max() <= (2e-2 if dtype == jnp.bfloat16 else 1e-5)
        off = 1e-4 if dtype == jnp.float32 else 2e-2
        assert name == "only padding" or max(bounds.ratios(got * (1 + off), o_THC)) > 1


def test_a_missing_slot_is_found() -> None:
    """The bounds find a single latent set to 0, of the first sequence's 127."""
    arrays, _, o_THC = _arrays("page borders", jnp.float32, jnp.float32)
    page = int(arrays[4][0, 0])
    lacking = (*arrays[:2], arrays[2].at[page, 5].set(0), *arrays[3:])
    assert bounds.ratios(_plain()(*lacking)[0], o_THC[0])[0] > 1


def test_one_query_each() -> None:
    """Without starts every sequence has one token, and the kernel for prefill chunks is not called."""
    (q_THC, q_THR, *cache, _), _, o_THC = _arrays("page borders", jnp.float32, jnp.float32)
    arrays = q_THC[:N], q_THR[:N], *cache, None
    bounds.check(_plain()(*arrays), o_THC[:N])
    kernel = _kernel(DecodeBlocks(pages=2, streams=2, tokens=4))
    bounds.check(kernel(*arrays), o_THC[:N])
    assert "latent_decode_blocks" not in str(jax.make_jaxpr(kernel)(*arrays))
    with pytest.raises(ValueError, match="22 queries for 6 sequences: without starts each sequence has one"):
        _grouped(_check)(q_THC, q_THR, *cache, None)


def test_sequences_that_share_a_row_of_the_table() -> None:
    """2 N sequences with a page table of N rows: the second half reads the first half's pages."""
    (q_THC, q_THR, latent_LKC, rope_LRK, table_NP, lengths_N, _), _, o_THC = _arrays(
        "page borders", jnp.float32, jnp.float32
    )
    queries = (jnp.concatenate([q[:N], q[N - 1 :: -1]]) for q in (q_THC, q_THR))
    arrays = *queries, latent_LKC, rope_LRK, table_NP, jnp.tile(lengths_N, 2), None
    plain, ours = _plain()(*arrays), _kernel(DecodeBlocks(pages=2, streams=2, tokens=4))(*arrays)
    bounds.check(ours[:N], o_THC[:N])
    np.testing.assert_allclose(ours, plain, atol=2e-6)


@pytest.mark.parametrize(
    ("blocks", "cores"),
    [(DecodeBlocks(pages=1, streams=3, tokens=2), 1), (DecodeBlocks(pages=4, streams=1, tokens=8), 2)],
    ids=["many streams", "two cores"],
)
def test_blocks(blocks: DecodeBlocks, cores: int) -> None:
    """The result does not depend on the blocks."""
    arrays, _, o_THC = _arrays("chunks and tokens", jnp.float32, jnp.float32)
    bounds.check(_kernel(blocks, cores=cores)(*arrays), o_THC)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.uint8])
def test_races(stored) -> None:
    """No copy is read before it arrives or overwritten while it runs; uninitialised memory reads as NaN."""
    arrays, scales, o_THC = _arrays("chunks and tokens", jnp.float32, stored)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    ours = _kernel(DecodeBlocks(pages=2, streams=2, tokens=4), interpret)(*arrays, scales_L1K=scales)
    bounds.check(ours, o_THC)
    assert not interpret_pallas_call.races.races_found


def test_mistakes() -> None:
    """Unsupported page sizes, invalid blocks, arguments that do not fit, and a device without kernels."""
    arrays, *_ = _arrays("page borders", jnp.float32, jnp.float32)
    small = (*arrays[:2], arrays[2][:, :64], arrays[3][:, :, :64], *arrays[4:])
    with pytest.raises(ValueError, match="pages of 64 slots: the kernel needs a multiple of 128"):
        _kernel(DecodeBlocks(pages=2, streams=1, tokens=4))(*small)
    with pytest.raises(ValueError, match="tokens at least 2"):
        DecodeBlocks(pages=1, streams=1, tokens=1)
    run = _grouped(latent_decode)
    with pytest.raises(ValueError, match="the kernels run on TPU v5e, v5p, v6e, tpu7x only"):
        run(*arrays)
    with pytest.raises(ValueError, match=r"lengths is float32\[6\]; the other arguments need int32\[6\]"):
        run(*arrays[:5], arrays[5].astype(float), arrays[6])
    with pytest.raises(ValueError, match="a page table of 6 rows for 4 sequences: the rows must divide the sequences"):
        run(*arrays[:5], arrays[5][:4], arrays[6][:5])
    queries = (jax.ShapeDtypeStruct((512, H, width), jnp.float32) for width in (C, R))
    integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((512, 512), (512,)))
    with pytest.raises(
        ValueError, match=r"512 tokens and a page table of 512 x 512 pages do not fit .* holds 500 such sequences"
    ):
        jax.eval_shape(_kernel(DecodeBlocks(pages=2, streams=1, tokens=4)), *queries, *arrays[2:4], *integers, None)


def test_mistakes_of_a_quantized_cache() -> None:
    """Scales that are missing, unexpected or of another shape, and a rope dim that does not fill words."""
    plain, *_ = _arrays("page borders", jnp.float32, jnp.float32)
    packed, scales, _ = _arrays("page borders", jnp.float32, jnp.uint8)
    run = _grouped(latent_decode)
    with pytest.raises(ValueError, match="a cache in uint8 needs scales"):
        run(*packed)
    with pytest.raises(ValueError, match="a cache in float32 takes no scales"):
        run(*plain, scales_L1K=scales)
    with pytest.raises(
        ValueError, match=r"scales is uint32\[26, 1, 64\]; the other arguments need uint32\[26, 1, 128\]"
    ):
        run(*packed, scales_L1K=scales[:, :, :64])
    with pytest.raises(
        ValueError, match=r"latent is uint8\[26, 128, 64\]; the other arguments need uint8\[26, 128, 96\]"
    ):
        run(*packed[:2], packed[2][:, :, :64], *packed[3:], scales_L1K=scales)
    narrow = (packed[0], packed[1][:, :, :56], packed[2], packed[3][:, :42], *packed[4:])
    with pytest.raises(ValueError, match="rope keys of 56: the kernel needs multiples of 4 and 16"):
        _kernel(DecodeBlocks(pages=2, streams=1, tokens=4))(*narrow, scales_L1K=scales)


# Every format on every chip, every shape on every chip, and every format at every shape: not all 36 of all three.
COMPILED = [
    (op, chip, list(shapes.LATENT_DECODE)[(i + j) % len(shapes.LATENT_DECODE)])
    for i, op in enumerate(STORED)
    for j, chip in enumerate(chips.KERNEL_CHIPS)
]


@pytest.mark.tpu
@pytest.mark.parametrize(("op", "chip", "shape"), COMPILED)
def test_compiles(op: str, chip: str, shape: str) -> None:
    """The kernel compiles for every chip with its tuned blocks, within VMEM, and copies every page once."""
    size = shapes.LATENT_DECODE[shape]
    result = cost.op_cost(OPS[op], chip, shape)
    alone, blocks = result.kernels
    latent, rope = (packing.width(width, STORED[op]) for width in (size.latent, size.rope))
    slot = jnp.dtype(STORED[op]).itemsize * (-(-latent // 128) * 128 + rope) + 4 * packing.is_packed(STORED[op])
    cache = size.sequences * size.length * slot // chips.CHIPS[chip].cores
    assert cache < alone.copied["hbm_to_vmem"] < 1.1 * cache
    assert max(alone.vmem, blocks.vmem) < chips.CHIPS[chip].vmem
    assert result.warnings == ()
    assert blocks.us < 5, "the kernel for prefill chunks costs little where there are none"
