"""What a kernel's call is charged, from a line of a compiled program."""

import pytest

from configs import layouts
from dsv2_jax.plan import hlo
from dsv2_jax.plan.kernels import Prices, _kernel
from pallas_kernels.chips import CHIPS

PROGRAM = """HloModule test, is_scheduled=true

ENTRY %main (p: s32[512], q: bf16[786432,256], r: bf16[786432,5120]) -> bf16[512,256,5120] {
  %p = s32[512]{0} parameter(0)
  %q = bf16[786432,256]{1,0} parameter(1)
  %r = bf16[786432,5120]{1,0} parameter(2)
  ROOT %combine.1 = bf16[512,256,5120]{2,1,0} custom-call(%p, %q, %r), custom_call_target="tpu_custom_call", CONFIG
}
"""
COST = r'backend_config={"custom_call_config":{"cost_estimate":{"flops":"FLOPS","bytes_accessed":"BYTES"}}}'


def test_adding_up_a_tokens_rows_costs_the_rows_that_a_router_sends():
    """Of 786,432 rows that the buffers have room for, four sequences of 4096 tokens with six experts fill an eighth."""
    config = layouts.on_topology("v2", "v5p:4x8x8")
    flops, out = 2 * 786_432 * 256 * 5120, 2 * 512 * 256 * 5120
    moved = 2 * 786_432 * (256 + 5120) + out
    cost = COST.replace("FLOPS", str(flops)).replace("BYTES", str(moved))
    main = hlo.parse(PROGRAM.replace("CONFIG", cost)).computations["main"]
    chip = CHIPS["v5p"]
    by_bandwidth = ((moved - out) / 8 + out) / (chip.hbm * chip.cores)
    assert flops / 8 / (chip.peak * chip.cores) < by_bandwidth
    seconds = Prices(config, "v5p", lambda _: None, tokens=4 * 4096).seconds(main.by_name["combine.1"], main)
    assert seconds == pytest.approx(by_bandwidth)


CALLED = """HloModule test, is_scheduled=true

ENTRY %main (x: bf16[64,256], w: DTYPE[4,256,128], s: f32[4,1,128]) -> bf16[64,128] {
  %x = bf16[64,256]{1,0} parameter(0)
  %w = DTYPE[4,256,128]{2,1,0} parameter(1)
  %s = f32[4,1,128]{2,1,0} parameter(2)
  ROOT %NAME.1 = bf16[64,128]{1,0} custom-call(%x, %w, %s), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize(
    ("name", "dtype", "op"),
    [
        ("gmm", "s8", "expert_down_int8"),
        ("gate_up", "f8e4m3fn", "expert_gate_up_float8"),
        ("gate_up", "bf16", "expert_gate_up"),
        ("latent_decode", "u8", "latent_decode_int6"),
        ("latent_decode", "s8", "latent_decode_int8"),
        ("latent_decode", "bf16", "latent_decode"),
        ("something", "bf16", None),
    ],
)
def test_a_call_is_priced_in_the_format_of_what_it_reads(name, dtype, op):
    main = hlo.parse(CALLED.replace("DTYPE", dtype).replace("NAME", name)).computations["main"]
    call = main.by_name[f"{name}.1"]
    arrays = [array for operand in call.operands for array in hlo.arrays(main.by_name[operand].shape)]
    assert _kernel(call, [dims for _, dims in arrays], {dtype for dtype, _ in arrays}) == op
