"""The tuning table has valid entries, and every other shape gets default blocks."""

import pytest

from pallas_kernels import chips
from pallas_kernels.latent_attention import decode_tuning
from pallas_kernels.pricing import ops


def test_entries() -> None:
    """Entries have known chips and the shapes of the ops."""
    decodes = [op for name, op in ops.OPS.items() if name.startswith("latent_decode")]
    keys = {op.key(shape) for op in decodes for shape in op.shapes.values()}
    assert {chip for chip, _ in decode_tuning.TUNED} <= set(chips.KERNEL_CHIPS)
    assert {key for _, key in decode_tuning.TUNED} <= keys


@pytest.mark.parametrize("heads", [1, 7, 128, 1024])
@pytest.mark.parametrize("page", [128, 384, 8192])
@pytest.mark.parametrize(("bits", "slots"), [(6, 4096), (16, 2048)])
def test_unlisted(heads: int, page: int, bits: int, slots: int) -> None:
    """Any shape on any chip has blocks, with chunks of at least one page and jobs of at least two tokens."""
    blocks = decode_tuning.blocks("v9", heads, page, bits)
    assert (blocks.pages, blocks.tokens) >= (1, 2)
    assert blocks.pages * page <= max(page, slots)
