"""The tuning table: entries that make sense, and an answer for every other shape."""

import pytest

from pallas_kernels import chips
from pallas_kernels.latent_attention import decode_tuning
from pallas_kernels.pricing import ops


def test_entries() -> None:
    """Listed are chips that exist and shapes that are priced."""
    decodes = [op for name, op in ops.OPS.items() if name.startswith("latent_decode")]
    priced = {op.key(shape) for op in decodes for shape in op.shapes.values()}
    assert {chip for chip, _ in decode_tuning.TUNED} <= set(chips.KERNEL_CHIPS)
    assert {key for _, key in decode_tuning.TUNED} <= priced


@pytest.mark.parametrize("heads", [1, 7, 128, 1024])
@pytest.mark.parametrize("page", [128, 384, 8192])
@pytest.mark.parametrize(("bits", "slots"), [(6, 4096), (16, 2048)])
def test_unlisted(heads: int, page: int, bits: int, slots: int) -> None:
    """Any shape, and any chip, gets blocks: chunks of one page at least, jobs of two tokens at least."""
    blocks = decode_tuning.blocks("v9", heads, page, bits)
    assert (blocks.pages, blocks.tokens) >= (1, 2)
    assert blocks.pages * page <= max(page, slots)
