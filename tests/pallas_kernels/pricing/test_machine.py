"""The machine on a few hand-written bundles: loops, delay slots, guards, copies and unknown values."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.pricing import bundles, machine

CHIP = dataclasses.replace(CHIPS["v5e"], clock=1e9, hbm=32e9)  # a granule of 32 bytes per cycle

# Copies 100 granules and waits for them; the scalar operand 0 is the number of trips.
LOOP = """
LH: loop header

     0   :  { %s1_s0 = inlined_call_operand.smem [shape: s32[1], index: 0, kind: input, shape index: {}] }
   0x1   :  { %s2_s1 = inlined_call_operand.hbm [shape: f32[8,100], index: 1, kind: input, shape index: {}] }
   0x2   :  { %s3_s2 = sld [smem:[%s1_s0]]  ;;  %s4_s3 = smov.u32 0 }
   0x3 LB: > { %5 = dma.hbm_to_vmem [thread:$0]  %s2_s1, /*size_in_granules=*/100, [#allocation2], [#allocation3] /*
 base_bounds: (64, 8)
 } ;; { */ } /* Start region 7 */
   0x4   : > { %6 = dma.done.wait [#allocation3], 100 }
   0x5   : > { %7 = vsyncadd [#allocation3], 4294967196  ;;  %s4_s3 = sadd.s32 1, %s4_s3 }
   0x6   : > { %p8_p0 = scmp.lt.s32.totalorder %s4_s3, %s3_s2 }
   0x7   : > { %9 = sbr.rel (%p8_p0) target = $region7 }
   0x8   : > { %s10_s4 = sadd.s32 1, %s10_s4 }
   0x9   : > {}
   0xa   : > {}
   0xb   : > { %11 = vmatmul.bf16.gmra.mxu0 %v1_v2  ;;  %12 = vst [vmem:[#allocation9_spill] sm:$0xff] %v3_v3 }
   0xc   :  { %p13_p1 = scmp.eq.s32.totalorder %s10_s4, 3 }
   0xd   :  { %14 = dma.vmem_to_hbm [thread:$0]  (%p13_p1), [#allocation2], 50, %s2_s1, [#allocation4] }
   0xe   :  { %15 = dma.vmem_to_hbm [thread:$0]  (!%p13_p1), [#allocation2], 7, %s2_s1, [#allocation4] }
"""


def _execute(text: str, chip: Chip = CHIP, **operands: int) -> machine.Trace:
    known = {int(name[1:]): np.array([value], np.int32) for name, value in operands.items()}
    return machine.execute(bundles.parse(text), chip, known)


def test_trips_and_copies() -> None:
    """Three trips with their delay slots: three copies in, and the copy out whose guard counts the trips."""
    trace = _execute(LOOP, _0=3)
    assert trace.copies == {"hbm_to_vmem": 3, "vmem_to_hbm": 1}
    assert trace.copied == {"hbm_to_vmem": 3 * 3200, "vmem_to_hbm": 50 * 32}
    loop = next(run for run in trace.runs if run.address == 3)
    # The first trip begins at bundle 0, the others at the head of the loop. Its matmul takes longer than its bundles.
    assert (loop.trips, loop.schedule.cycles, loop.schedule.matmuls, loop.schedule.spills) == (2, 16, 1, 1)
    assert loop.schedule.mxu_cycles == 16 / 4
    assert trace.warnings == ()


@pytest.mark.parametrize(("slots", "label", "matmuls"), [(2, False, 1), (4, False, 3), (4, True, 1), (6, True, 1)])
def test_delay_slots_end_at_a_label(slots: int, label: bool, matmuls: int) -> None:
    """The matmul four bundles after the branch runs on each trip, or only on the last if it follows a label or the last
    delay slot."""
    text = LOOP
    if label:
        text = text.replace("0xa   : > {}", "0xa   : > {} /* Start region 8 */")
        text += "   0xf   :  { %16 = sbr.rel (%p9_p9) target = $region8 }\n"
    trace = _execute(text, dataclasses.replace(CHIP, delay_slots=slots), _0=3)
    assert trace.copies == {"hbm_to_vmem": 3, "vmem_to_hbm": 1}
    assert sum(run.trips * run.schedule.matmuls for run in trace.runs) == matmuls


def test_a_region_without_a_bundle_is_the_end() -> None:
    """A branch to such a region skips the loop, so nothing is copied."""
    skip = "   0x2   :  { %9 = sbr.rel target = $region9 }\n" + "".join(f"   0x2{c}   :  {{}}\n" for c in "abc")
    trace = _execute(LOOP.replace("   0x2   :  {", skip + "   0x2d   :  {"), _0=3)
    assert trace.copies == {} and trace.warnings == ()


def test_general_copy() -> None:
    """The comment of a copy by descriptor gives its direction."""
    operands = "[#allocation2], 100, %s2_s1, [#allocation4], [#allocation5], [#allocation6], %s9_s9, 0"
    trace = _execute(f"     0   :  {{ %1 = dma.general /*src=*/{operands} /* vmem-to-hbm */ }}")
    assert trace.copied == {"vmem_to_hbm": 3200}


def test_time() -> None:
    """A wait stalls for the copy's 100 cycles and 700 of latency, less the bundle between."""
    trace = _execute(LOOP, _0=3)
    assert trace.hbm_cycles == 3 * 100 + 50
    assert trace.stalled == 3 * (100 + 700 - 1)
    assert trace.cycles == trace.stalled + 3 * 16 + 3


def test_unknown() -> None:
    """A branch on an unknown value is not taken, with a warning."""
    trace = _execute(LOOP)
    assert trace.copies == {"hbm_to_vmem": 1, "vmem_to_hbm": 1}
    assert trace.warnings == ("sbr.rel depends on an unknown value (x1)",)


@pytest.mark.parametrize(
    ("op", "operands", "result"),
    [
        ("sadd.s32", (2**32 - 1, 3), 2),
        ("ssub.s32", (1, 3), 2**32 - 2),
        ("smul.u32", (2**31, 2), 0),
        ("sshra.s32", (2**32 - 8, 1), 2**32 - 4),
        ("sshrl.u32", (2**32 - 8, 1), 2**31 - 4),
        ("sshll.u32", (1, 32), 0),
        ("smax.s32", (2**32 - 1, 1), 1),
        ("smax.u32", (2**32 - 1, 1), 2**32 - 1),
        ("scmp.lt.s32.totalorder", (2**32 - 1, 0), 1),
        ("scmp.lt.u32.totalorder", (2**32 - 1, 0), 0),
        ("por", (1, None), 1),
        ("por", (0, None), None),
        ("pand", (0, None), 0),
        ("pnand", (None, 1), None),
        ("scalar_select", (0, 5, 6), 6),
        ("scalar_select", (None, 5, 6), None),
    ],
)
def test_instructions(op: str, operands: tuple, result: int | None) -> None:
    """32 bits, signed if the name says so. Results that do not depend on an unknown value are known."""
    function = machine._function(op)
    assert function is not None
    assert function(*operands) == result


def test_a_matrix_in_scalar_memory_has_rows_of_128_words() -> None:
    """Negative numbers are stored in two's complement."""
    words = machine.smem_words(np.array([[1, 2, 3], [-1, 5, 6]], np.int32))
    assert (len(words), words[:4], words[128:131]) == (256, [1, 2, 3, 0], [2**32 - 1, 5, 6])


def test_narrow_integers_share_words() -> None:
    """A word holds four int8 values: of four parts of a vector, or of four rows of a matrix with tiles of 8 rows."""
    words = machine.smem_words(np.array([1, -1] + [0] * 126 + [7], np.int8))
    assert (len(words), words[:3]) == (128, [0x701, 0xFF, 0])
    matrix = np.zeros((8, 256), np.int8)
    matrix[[0, 1, 4], [0, 0, 130]] = 1, 2, 3
    words = machine.smem_words(matrix)
    # A tile has two rows of words: both rows of the first 128 columns precede the next columns.
    assert (len(words), words[0], words[128 * 3 + 2]) == (512, 0x201, 3)
