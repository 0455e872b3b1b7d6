"""Block sizes by op, chip and shape, and what to take for shapes that are not listed: never an error.

Each entry was printed by `python -m pallas_kernels.cost OP --chip CHIP --shape SHAPE --tune`, which tries candidates.
"""

from pallas_kernels.latent_attention.decode_kernel import Blocks as LatentDecodeBlocks

# (chip, (heads, slots of a page))
LATENT_DECODE: dict[tuple[str, tuple[int, int]], LatentDecodeBlocks] = {
    ("v5e", (128, 256)): LatentDecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5e", (16, 256)): LatentDecodeBlocks(pages=4, streams=1, tokens=16),
    ("v5e", (4, 128)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (128, 256)): LatentDecodeBlocks(pages=8, streams=1, tokens=4),
    ("v5p", (16, 256)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v5p", (4, 128)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (128, 256)): LatentDecodeBlocks(pages=8, streams=2, tokens=4),
    ("v6e", (16, 256)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("v6e", (4, 128)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
    ("tpu7x", (128, 256)): LatentDecodeBlocks(pages=16, streams=1, tokens=4),
    ("tpu7x", (16, 256)): LatentDecodeBlocks(pages=16, streams=1, tokens=16),
    ("tpu7x", (4, 128)): LatentDecodeBlocks(pages=4, streams=2, tokens=16),
}


def latent_decode(chip: str, heads: int, page: int) -> LatentDecodeBlocks:
    """Blocks for a cache with pages of so many slots. Unlisted: chunks of 2048 slots, jobs of some 512 rows."""
    listed = LATENT_DECODE.get((chip, (heads, page)))
    return listed or LatentDecodeBlocks(pages=max(1, 2048 // page), streams=2, tokens=max(2, min(16, 512 // heads)))
