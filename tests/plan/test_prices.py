"""What a kernel's call is charged, from a line of a compiled program."""

from types import SimpleNamespace

import pytest

from configs import layouts
from dsv2_jax.plan import hlo
from dsv2_jax.plan.kernels import Prices, _kernel
from pallas_kernels import cost

PROGRAM = """HloModule test, is_scheduled=true

ENTRY %main (p: s32[512], q: bf16[786432,256], r: bf16[786432,5120]) -> bf16[512,256,5120] {
  %p = s32[512]{0} parameter(0)
  %q = bf16[786432,256]{1,0} parameter(1)
  %r = bf16[786432,5120]{1,0} parameter(2)
  ROOT %combine.1 = bf16[512,256,5120]{2,1,0} custom-call(%p, %q, %r), custom_call_target="tpu_custom_call", CONFIG
}
"""
COST = r'backend_config={"custom_call_config":{"cost_estimate":{"flops":"FLOPS","bytes_accessed":"BYTES"}}}'


def test_adding_up_a_tokens_rows_costs_the_rows_that_a_router_sends(monkeypatch, tmp_path):
    """Of 786,432 rows that the buffers have room for, four sequences of 4096 tokens with six experts fill an eighth.

    The kernel is priced with these and with all the tokens that it writes; so a call takes what that took.
    """
    priced = []

    def price(_, args, chip, *, flops, bytes):
        priced.append((args, chip, flops, bytes))
        return SimpleNamespace(kernels=[SimpleNamespace(name="combine.1", us=700.0)])

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "cost", price)
    config = layouts.on_topology("v2", "v5p:4x8x8")
    flops = 2 * 786_432 * 256 * 5120
    declared = COST.replace("FLOPS", str(flops)).replace("BYTES", "0")
    main = hlo.parse(PROGRAM.replace("CONFIG", declared)).computations["main"]
    prices = Prices(config, "v5p", lambda _: None, tokens=4 * 4096)
    assert prices.seconds(main.by_name["combine.1"], main) == pytest.approx(700e-6)
    (((own, rows, sizes), chip, useful, moved),) = priced
    assert chip == "v5p" and (own.shape, rows.shape) == ((98_304, 256), (98_304, 5120))
    assert sizes.shape == (512,) and sizes.sum() == 98_304
    assert useful == flops / 8 and moved == 2 * (98_304 * (256 + 5120) + 512 * 256 * 5120)


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
        ("combine", "bf16", "expert_combine"),
        ("something", "bf16", None),
    ],
)
def test_a_call_is_priced_in_the_format_of_its_operands(name, dtype, op):
    main = hlo.parse(CALLED.replace("DTYPE", dtype).replace("NAME", name)).computations["main"]
    call = main.by_name[f"{name}.1"]
    arrays = [array for operand in call.operands for array in hlo.arrays(main.by_name[operand].shape)]
    assert _kernel(call, [dims for _, dims in arrays], {dtype for dtype, _ in arrays}) == op
