"""Latent attention over a paged cache: absorbed queries of ragged sequences, single tokens and prefill chunks.

T query tokens of all sequences, H heads; the other letters as in pages.py.
"""

from jax import Array
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.latent_attention import decode_kernel, decode_tuning, packing
from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks
from pallas_kernels.latent_attention.pages import CachePages, Sequences


def latent_decode(
    queries: tuple[Array, Array],
    pages: CachePages,
    sequences: Sequences,
    *,
    scale: float,
    blocks: DecodeBlocks | None = None,
) -> Array:
    """softmax(scale (q_c c^T + q_r r^T)) c with the softmax in float32, [T, H, C] in q's dtype (section 2.1, App. C).

    queries: (q_c [T, H, C], the queries times the key's up-projection; q_r [T, H, R], their rope part). A query sees
    the slots of its sequence up to its own. Tokens of padding give zero. Without `sequences.starts_N1` the kernel for
    prefill chunks is not called.

    blocks: how the kernel splits the work; by default those of decode_tuning.py. Raises ValueError for shapes or dtypes
    that do not fit, on a device other than the TPUs in `chips.CHIPS`, for pages whose slots are not a multiple of 128,
    and for a quantized cache unless C is a multiple of 4 and R of 16.
    """
    check(queries, pages, sequences)
    chip = chips.require()
    bits = packing.bits(pages.latent_LKC.dtype)
    blocks = blocks or decode_tuning.blocks(chip, queries[0].shape[1], pages.latent_LKC.shape[1], bits)
    cores = pltpu.get_tpu_info().num_cores
    return decode_kernel.decode(queries, pages, sequences, scale=scale, blocks=blocks, cores=cores)


def check(queries: tuple[Array, Array], pages: CachePages, sequences: Sequences) -> None:
    """Raises ValueError for shapes or dtypes that do not fit each other."""
    (q_c, q_r), (latent, rope, scales), (table, lengths, starts) = queries, pages, sequences
    (t, h, c), r, (count, k, _), (n,) = q_c.shape, q_r.shape[-1], latent.shape, lengths.shape
    packed = packing.is_packed(latent.dtype)
    stored = latent.dtype if packed else q_c.dtype
    expected = {
        "q_r": (q_r, (t, h, r), q_c.dtype),
        "latent": (latent, (count, k, packing.width(c, stored)), stored),
        "rope": (rope, (count, packing.width(r, stored), k), stored),
        "table": (table, table.shape, "int32"),
        "lengths": (lengths, (n,), "int32"),
    }
    if n % len(table):
        raise ValueError(f"a page table of {len(table)} rows for {n} sequences: the rows must divide the sequences")
    if starts is not None:
        expected["starts"] = (starts, (n + 1,), "int32")
    elif t != n:
        raise ValueError(f"{t} queries for {n} sequences: without starts each sequence has one query")
    if packed != (scales is not None):
        raise ValueError(f"a cache in {latent.dtype} {'needs' if packed else 'takes no'} scales")
    if scales is not None:
        expected["scales"] = (scales, (count, 1, k), "uint32")
    for name, (given, shape, dtype) in expected.items():
        if given.shape != shape or given.dtype != dtype:
            raise ValueError(
                f"{name} is {given.dtype}{list(given.shape)}; the other arguments need {dtype}{list(shape)}"
            )
