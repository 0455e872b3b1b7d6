"""Latent attention over a paged cache: absorbed queries, ragged sequences, decode tokens beside prefill chunks.

T query tokens of all sequences, H heads, C latent, R rope dim, N sequences, P pages of a sequence, L pages in all, K
slots of a page.
"""

from typing import Literal

from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, tuning
from pallas_kernels.latent_attention import decode_kernel, packing, reference_decode
from pallas_kernels.latent_attention.decode_kernel import Blocks


def decode(
    q_THC: Array,
    q_THR: Array,
    latent_LKC: Array,
    rope_LRK: Array,
    table_NP: Array,
    lengths_N: Array,
    starts_N1: Array | None,
    *,
    scale: float,
    implementation: Literal["pallas", "xla"],
    scales_L1K: Array | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """softmax(scale (q_c c^T + q_r r^T)) c in float32, [T, H, C] in q's dtype: section 2.1's absorbed form.

    q_THC: queries times the key's up-projection; q_THR: their rope part. The cache is paged and not padded: latents
    [L, K, C] and rope keys [L, R, K], transposed so that they fill whole tiles. Sequence n has its first lengths[n]
    slots filled, in the order of its pages table[n]; a table of fewer rows, which must divide N, begins again for those
    beyond, so that two sequences may share a row. Its queries are rows starts[n] to starts[n + 1] - 1, the last of
    them at slot lengths[n] - 1, each seeing the slots up to its own. Rows from starts[N] on are padding and give zero.
    Without starts every sequence has one query, and T = N: the kernel of prefill chunks is then not called at all.
    Integers are int32, all else of one dtype. Slots and pages that are in no sequence may hold anything.

    A cache in fewer bits (section 3.2.3) is int8, or 6-bit integers packed in uint8: latents [L, K, 3 C / 4] and rope
    keys [L, 3 R / 4, K]. scales_L1K, uint32, then holds both scales of each slot; packing.py says how.

    blocks: how the kernel cuts the work; tuning.py's unless given. Raises ValueError for shapes, dtypes or an
    implementation that cannot be: the kernel needs a TPU, pages of a multiple of 128 slots and, in fewer bits, C a
    multiple of 4 and R of 16.
    """
    arrays = (q_THC, q_THR, latent_LKC, rope_LRK, table_NP, lengths_N, starts_N1)
    _check(*arrays, scales_L1K)
    match implementation:
        case "xla":
            return reference_decode.decode(*arrays, scale=scale, scales_L1K=scales_L1K)
        case "pallas":
            chip = chips.needed()
            bits = packing.bits(latent_LKC.dtype)
            blocks = blocks or tuning.latent_decode(chip, q_THC.shape[1], latent_LKC.shape[1], bits)
            cores = pltpu.get_tpu_info().num_cores
            return decode_kernel.decode(*arrays, scale=scale, scales_L1K=scales_L1K, blocks=blocks, cores=cores)
        case _:
            raise ValueError(f'no implementation {implementation!r}: there are "pallas" and "xla"')


def _check(
    q_c: Array,
    q_r: Array,
    latent: Array,
    rope: Array,
    table: Array,
    lengths: Array,
    starts: Array | None,
    scales: Array | None,
) -> None:
    (t, h, c), r, (pages, k, _), (n,) = q_c.shape, q_r.shape[-1], latent.shape, lengths.shape
    packed = packing.is_packed(latent.dtype)
    stored = latent.dtype if packed else q_c.dtype
    expected = {
        "q_r": (q_r, (t, h, r), q_c.dtype),
        "latent": (latent, (pages, k, packing.width(c, stored)), stored),
        "rope": (rope, (pages, packing.width(r, stored), k), stored),
        "table": (table, table.shape, "int32"),
        "lengths": (lengths, (n,), "int32"),
    }
    if n % len(table):
        raise ValueError(f"a table of {len(table)} rows for {n} sequences: the rows must divide the sequences")
    if starts is not None:
        expected["starts"] = (starts, (n + 1,), "int32")
    elif t != n:
        raise ValueError(f"{t} queries of {n} sequences: without starts each has one")
    if packed != (scales is not None):
        raise ValueError(f"a cache in {latent.dtype} {'needs' if packed else 'has no'} scales")
    if scales is not None:
        expected["scales"] = (scales, (pages, 1, k), "uint32")
    for name, (given, shape, dtype) in expected.items():
        if given.shape != shape or given.dtype != dtype:
            raise ValueError(f"{name} is {given.dtype}{list(given.shape)}, where {dtype}{list(shape)} fits the others")
