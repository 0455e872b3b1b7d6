"""The table of the paper's claims, compared with the figures that the paper prints."""

import dataclasses
from pathlib import Path

from configs import models
from configs.layouts import LAYOUTS, on_topology
from dsv2_jax.plan import claims
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import Time, estimate
from dsv2_jax.plan.program import CompiledProgram


def test_counts_are_taken_from_real_arrays():
    assert claims.cached_numbers(models.dense_67b()) == 2 * 8 * 128 * 95
    assert claims.cached_numbers(models.v2()) == 60 * (512 + 64)
    assert claims.parameters(models.v2_lite()) == 15_706_484_224  # as in the released checkpoint
    assert claims.parameters(models.v2()) == 235_741_434_880
    assert round(claims.activated(models.v2()) / 1e9, 1) == 20.9
    assert round(claims.activated(models.v2_lite()) / 1e9, 1) == 2.5


def test_table_follows_from_the_estimates():
    """If V2 is twice as fast as the dense model, it costs half as much. The other rows are the paper's arithmetic."""
    topology = Topology("v5p:4x8x8")

    def plan(config, topology, work):
        program = CompiledProgram(
            fits=False,
            used=1,
            limit=1,
            parameters=0,
            optimizer=0,
            batch=0,
            cache=0,
            gradients=0,
            coords=(),
            seconds=0,
            host_bytes=0,
        )
        if work != "step":  # the cache takes one byte per row, so every capacity fits
            program = dataclasses.replace(program, cache=work.rows, used=0, fits=True, limit=2**30)
        e = estimate(laid_out(config, topology, work), topology, program, "")
        speed = 2000.0 if config.model.moe_layers else 1000.0
        time = Time(step=1, xla=1, unestimated=0, kernels=0, exposed=0, copies=0, at_peak=1)
        return dataclasses.replace(e, time=time, tokens_per_second_per_chip=speed)

    rows = {row.what: row for row in claims.claims(topology, Topology("v5p:2x2x2"), plan)}
    assert rows["KV cache per token, V2 relative to the dense 67B"].ours == "-93.3%"
    assert rows["Table 9, 16B MoE: numbers cached per token, MHA and MLA"].ours == "110.6K, 15.6K, 14%"
    assert rows["Table 9, 250B MoE: numbers cached per token, MHA and MLA"].ours == "860.2K, 34.6K, 4%"
    cost = rows["chip hours per trillion tokens, V2 and the dense 67B"].ours
    assert cost == "138.9K and 277.8K: -50.0%"
    generation = rows["generation throughput, V2 and the dense 67B"]
    assert generation.ours == "2,000 and 1,000 tokens/s per chip: 2.00 times"
    assert claims.table(list(rows.values())).count("\n") == len(rows) + 1


def test_every_layout_suits_its_slice():
    for name, topology in LAYOUTS:
        config = laid_out(on_topology(name, topology), Topology(topology))
        assert config.batch.size * config.batch.length >= config.mesh.size("fsdp")


def test_claims_page_contains_the_printed_table():
    """Compares all rows that need no compilation."""
    page = (Path(__file__).parent.parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    for row in claims.table(claims.claims(Topology("v5p:4x8x8"), Topology("v5p:2x2x2"), None)).splitlines():
        if "pending" not in row:
            assert row in page
