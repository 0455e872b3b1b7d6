"""The tuning table has valid entries, and every other shape gets default blocks."""

import pytest

from pallas_kernels import chips, ops, tuning


def test_entries() -> None:
    """Listed are chips that exist and shapes that are priced."""
    decodes = [op for name, op in ops.OPS.items() if name.startswith("latent_decode")]
    priced = {op.key(shape) for op in decodes for shape in op.shapes.values()}
    assert {chip for chip, _ in tuning.LATENT_DECODE} <= set(chips.CHIPS)
    assert {key for _, key in tuning.LATENT_DECODE} <= priced


@pytest.mark.parametrize("heads", [1, 7, 128, 1024])
@pytest.mark.parametrize("page", [128, 384, 8192])
@pytest.mark.parametrize(("bits", "slots"), [(6, 4096), (16, 2048)])
def test_unlisted(heads: int, page: int, bits: int, slots: int) -> None:
    """Any shape, and any chip, gets blocks: chunks of one page at least, jobs of two tokens at least."""
    blocks = tuning.latent_decode("v9", heads, page, bits)
    assert (blocks.pages, blocks.tokens) >= (1, 2)
    assert blocks.pages * page <= max(page, slots)
