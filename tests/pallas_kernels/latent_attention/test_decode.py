"""Decode over a paged cache, kernel and plain twin, against float64: ragged lengths, page borders, poisoned slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.latent_attention import decode, decode_reference

C, R, K = 128, 64, 128
SCALE = 0.08


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences as (slots filled, queries of this call), and rows of padding behind the queries."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 16
    padding: int = 0


CASES = {
    "one token each, uneven": Case(((300, 1), (5, 1), (1, 1), (256, 1), (511, 1))),
    "page borders": Case(((127, 1), (128, 1), (129, 1), (384, 1), (385, 1))),
    "a first prompt": Case(((70, 70),), heads=4),
    "chunks beside tokens": Case(((300, 9), (2, 1), (129, 2), (260, 1), (3, 3)), heads=4, padding=3),
    "sequences without queries": Case(((40, 0), (200, 1), (9, 0), (130, 5), (64, 0)), heads=4, padding=2),
    "only padding": Case(((64, 0),), padding=2),
}


def _arrays(case: Case, dtype, seed: int = 0) -> tuple[tuple, np.ndarray]:
    """The op's arguments, every slot that is in no sequence NaN, and what float64 makes of them."""
    rng = np.random.default_rng(seed)
    n, t = len(case.sequences), sum(q for _, q in case.sequences) + case.padding
    p = max(-(-slots // K) for slots, _ in case.sequences) + 1
    pages = rng.permutation(n * p + 2)[: n * p].reshape(n, p)
    latent_LKC = np.full((n * p + 2, K, C), np.nan)
    rope_LRK = np.full((n * p + 2, R, K), np.nan)
    q_THC, q_THR = (np.asarray(rng.normal(size=(t, case.heads, d)), dtype) for d in (C, R))
    o_THC = np.zeros((t, case.heads, C))
    starts = np.cumsum([0] + [q for _, q in case.sequences])
    for (slots, queries), row, start in zip(case.sequences, pages, starts[:-1], strict=True):
        c_SC, r_SR = (np.asarray(rng.normal(size=(slots, d)), dtype) for d in (C, R))
        for s in range(slots):
            latent_LKC[row[s // K], s % K] = c_SC[s]
            rope_LRK[row[s // K], :, s % K] = r_SR[s]
        c_SC, r_SR = c_SC.astype(np.float64), r_SR.astype(np.float64)
        for i in range(queries):
            q_HC, q_HR = (x[start + i].astype(np.float64) for x in (q_THC, q_THR))
            seen = slots - queries + i + 1
            scores_HS = SCALE * (q_HC @ c_SC[:seen].T + q_HR @ r_SR[:seen].T)
            p_HS = np.exp(scores_HS - scores_HS.max(axis=1, keepdims=True))
            o_THC[start + i] = p_HS / p_HS.sum(axis=1, keepdims=True) @ c_SC[:seen]
    lengths = np.array([slots for slots, _ in case.sequences])
    integers = (jnp.asarray(x, jnp.int32) for x in (pages, lengths, starts))
    floats = (jnp.asarray(x, dtype) for x in (q_THC, q_THR, latent_LKC, rope_LRK))
    return (*floats, *integers), o_THC


def _kernel(arrays: tuple, blocks: decode.Blocks, interpret=True, cores: int = 1) -> np.ndarray:
    run = jax.jit(lambda *a: decode.decode(*a, scale=SCALE, blocks=blocks, cores=cores, interpret=interpret))
    return np.asarray(run(*arrays), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, dtype) -> None:
    """Both agree with float64, the kernel within twice the plain twin's error; poison stays where it is."""
    arrays, truth = _arrays(CASES[name], dtype)
    plain = np.asarray(jax.jit(lambda *a: decode_reference.decode(*a, scale=SCALE))(*arrays), np.float64)
    ours = _kernel(arrays, decode.Blocks(pages=2, streams=2, tokens=4))
    error, bound = np.abs(ours - truth).max(), np.abs(plain - truth).max()
    assert bound <= (2e-2 if dtype == jnp.bfloat16 else 1e-5)
    assert error <= 2 * bound + 1e-7


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (1, 3, 2), (4, 2, 8)], ids=str)
def test_blocks(blocks: tuple[int, int, int], cores: int) -> None:
    """How the work is cut does not change the result."""
    arrays, truth = _arrays(CASES["chunks beside tokens"], jnp.float32)
    pages, streams, tokens = blocks
    ours = _kernel(arrays, decode.Blocks(pages=pages, streams=streams, tokens=tokens), cores=cores)
    np.testing.assert_allclose(ours, truth, atol=2e-6)


def test_races() -> None:
    """No copy is read before it has arrived, none overwritten while it travels; uninitialised memory reads as NaN."""
    arrays, truth = _arrays(CASES["chunks beside tokens"], jnp.float32)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    ours = _kernel(arrays, decode.Blocks(pages=2, streams=2, tokens=4), interpret=interpret)
    np.testing.assert_allclose(ours, truth, atol=2e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found


def test_page_size() -> None:
    arrays, _ = _arrays(CASES["page borders"], jnp.float32)
    arrays = (*arrays[:2], arrays[2][:, :64], arrays[3][:, :, :64], *arrays[4:])
    with pytest.raises(ValueError, match="pages of 64 slots: the kernel needs a multiple of 128"):
        _kernel(arrays, decode.Blocks(pages=2, streams=1, tokens=4))
