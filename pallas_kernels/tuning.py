"""Block sizes by op, chip and shape, and what to take for shapes that are not listed: never an error.

Each entry was printed by `python -m pallas_kernels.cost OP --chip CHIP --shape SHAPE --tune`, which tries candidates.
"""

from pallas_kernels.latent_attention.decode_kernel import Blocks as LatentDecodeBlocks

# (chip, (heads, slots of a page))
LATENT_DECODE: dict[tuple[str, tuple[int, int]], LatentDecodeBlocks] = {}


def latent_decode(chip: str, heads: int, page: int) -> LatentDecodeBlocks:
    """Blocks for a cache with pages of so many slots. Unlisted: chunks of 1024 slots, jobs of up to 512 rows."""
    listed = LATENT_DECODE.get((chip, (heads, page)))
    return listed or LatentDecodeBlocks(pages=max(1, 1024 // page), streams=2, tokens=max(2, min(16, 512 // heads)))
