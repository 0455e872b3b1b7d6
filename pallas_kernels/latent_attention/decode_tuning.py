"""Block sizes of the decode kernel by chip and shape, with a default for every other shape.

Each entry was printed by `python -m pallas_kernels.cost OP --chip CHIP --shape SHAPE --tune`, which tries candidates.
"""

from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks

# (chip, (heads, slots of a page, bits of a cached number))
TUNED: dict[tuple[str, tuple[int, int, int]], DecodeBlocks] = {
    ("v5e", (128, 256, 16)): DecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5e", (16, 256, 16)): DecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5e", (4, 128, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5e", (4, 128, 6)): DecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5e", (4, 128, 8)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (128, 256, 16)): DecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5p", (16, 256, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (4, 128, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (4, 128, 6)): DecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5p", (4, 128, 8)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (128, 256, 16)): DecodeBlocks(pages=8, streams=2, tokens=4),
    ("v6e", (16, 256, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (4, 128, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (4, 128, 6)): DecodeBlocks(pages=4, streams=1, tokens=16),
    ("v6e", (4, 128, 8)): DecodeBlocks(pages=4, streams=1, tokens=16),
    ("tpu7x", (128, 256, 16)): DecodeBlocks(pages=16, streams=1, tokens=4),
    ("tpu7x", (16, 256, 16)): DecodeBlocks(pages=16, streams=1, tokens=16),
    ("tpu7x", (4, 128, 16)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("tpu7x", (4, 128, 6)): DecodeBlocks(pages=4, streams=2, tokens=16),
    ("tpu7x", (4, 128, 8)): DecodeBlocks(pages=4, streams=2, tokens=16),
}


def blocks(chip: str, heads: int, page: int, bits: int) -> DecodeBlocks:
    """Blocks for pages of `page` slots, with numbers of `bits` bits.

    Shapes that are not listed get chunks of 2048 slots in two streams. Below 16 bits they get 4096 slots in one stream,
    because there the unpacking overlaps with the matrix unit, as a second stream would. Prefill jobs have about 512
    rows.
    """
    listed = TUNED.get((chip, (heads, page, bits)))
    slots, streams = (2048, 2) if bits >= 16 else (4096, 1)
    tokens = max(2, min(16, 512 // heads))
    return listed or DecodeBlocks(pages=max(1, slots // page), streams=streams, tokens=tokens)
