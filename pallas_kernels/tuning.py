"""Block sizes by op, chip and shape, and what to take for shapes that are not listed: never an error.

Each entry was printed by `python -m pallas_kernels.cost OP --chip CHIP --shape SHAPE --tune`, which tries candidates.
"""

from pallas_kernels.latent_attention.decode_kernel import Blocks as LatentDecodeBlocks

# (chip, (heads, slots of a page, bits of a cached number))
LATENT_DECODE: dict[tuple[str, tuple[int, int, int]], LatentDecodeBlocks] = {
    ("v5e", (128, 256, 16)): LatentDecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5e", (16, 256, 16)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5e", (4, 128, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5e", (4, 128, 6)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5e", (4, 128, 8)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (128, 256, 16)): LatentDecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5p", (16, 256, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (4, 128, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (4, 128, 6)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5p", (4, 128, 8)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (128, 256, 16)): LatentDecodeBlocks(pages=8, streams=2, tokens=4),
    ("v6e", (16, 256, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (4, 128, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (4, 128, 6)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("v6e", (4, 128, 8)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("tpu7x", (128, 256, 16)): LatentDecodeBlocks(pages=16, streams=1, tokens=4),
    ("tpu7x", (16, 256, 16)): LatentDecodeBlocks(pages=16, streams=1, tokens=16),
    ("tpu7x", (4, 128, 16)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("tpu7x", (4, 128, 6)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("tpu7x", (4, 128, 8)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
}


def latent_decode(chip: str, heads: int, page: int, bits: int) -> LatentDecodeBlocks:
    """Blocks for pages of so many slots of numbers in so many bits.

    Unlisted: chunks of 2048 slots in two streams, of 4096 in one where numbers have to be unpacked, for that keeps the
    matrix unit company as another stream would; jobs of some 512 rows.
    """
    listed = LATENT_DECODE.get((chip, (heads, page, bits)))
    slots, streams = (2048, 2) if bits >= 16 else (4096, 1)
    tokens = max(2, min(16, 512 // heads))
    return listed or LatentDecodeBlocks(pages=max(1, slots // page), streams=streams, tokens=tokens)
