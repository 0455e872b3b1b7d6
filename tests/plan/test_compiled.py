"""Estimates of programs compiled for real TPUs, against FLOPs, bytes and times worked out by hand."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv2_jax.parallel import xla
from dsv2_jax.plan import hlo, network
from dsv2_jax.plan.program import sparsecore_calls
from dsv2_jax.plan.timeline import simulate
from pallas_kernels.chips import CHIPS

pytestmark = pytest.mark.tpu
D, LAYERS, TOKENS = 4096, 7, 16_384  # tokens of each of the four chips
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def timeline_of(function, chip, tpus, arguments, specs, out):
    """Simulates a function under shard_map on a square of four chips. arguments: shapes of bfloat16 arrays."""
    devices = np.array(tpus(TOPOLOGY[chip])).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("a", "b"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(arguments, specs, strict=True)
    ]
    with tempfile.TemporaryDirectory() as dumps:
        jax.jit(mapped).lower(*shapes).compile(xla.options() | {"xla_dump_to": dumps, "xla_dump_hlo_as_text": True})
        (printed,) = Path(dumps).glob("*after_codegen.txt")
        module = hlo.parse(sparsecore_calls(printed.read_text()))
    torus = network.Torus(CHIPS[chip], tuple(network.coordinates(device) for device in mesh.devices.flat))
    return simulate(module, torus, lambda *_: 0.0)


def layers(x_ND, w_LDD):
    """Two products per iteration: with one, XLA copies the carry."""
    return lax.scan(lambda x, w: (x @ w @ w.T, None), x_ND, w_LDD)[0]


SPLIT, REPLICATED = PartitionSpec(("a", "b")), PartitionSpec()


@pytest.mark.parametrize(("chip", "error"), [("v5e", 0.3), ("v5p", 0.3), ("v6e", 0.9)])
def test_products_in_loops_take_at_least_their_flops_at_the_peak(tpus, chip, error):
    """The excess is the inefficiency in XLA's own estimates. Nested loops multiply their trip counts."""

    def function(x_ND, w_LDD, repeats):
        return lax.scan(lambda x, _: (layers(x, w_LDD), None), x_ND, length=repeats)[0]

    shapes, specs = ((4 * TOKENS, D), (LAYERS, D, D)), (SPLIT, REPLICATED)
    seconds = {}
    for repeats in (1, 5):
        timeline = timeline_of(functools.partial(function, repeats=repeats), chip, tpus, shapes, specs, SPLIT)
        ideal = repeats * LAYERS * 4 * TOKENS * D * D / (CHIPS[chip].peak * CHIPS[chip].cores)
        seconds[repeats] = timeline.seconds
        print(f"{chip}, {repeats} x {LAYERS} x 2 products: {timeline.seconds / ideal - 1:+.1%} to the peak")
        assert ideal < timeline.seconds < (1 + error) * ideal
        assert not timeline.unknown_loops
    assert seconds[5] == pytest.approx(5 * seconds[1], rel=0.03)


def test_collectives_send_the_bytes_worked_out_by_hand(tpus):
    def function(x_ND):
        def body(x, _):
            gathered = lax.all_gather(x, ("a", "b"), axis=0, tiled=True)
            x = lax.psum_scatter(gathered, ("a", "b"), scatter_dimension=0, tiled=True)
            x = lax.all_to_all(x, ("a", "b"), 0, 1, tiled=True).reshape(x.shape)
            x = lax.ppermute(x, ("a", "b"), [(i, (i + 1) % 4) for i in range(4)])
            return x + lax.psum(x, ("a", "b")), None

        return lax.scan(body, x_ND, length=6)[0]

    timeline = timeline_of(function, "v5p", tpus, [(4 * TOKENS, D)], [SPLIT], SPLIT)
    wires = sorted(use.wire for use in timeline.uses.values() if use.wire)
    shard = 6 * TOKENS * D * 2
    expected = sorted(shard * factor for factor in (3, 3, 3 / 4, 1, 2 * 3 / 4))
    assert wires == pytest.approx(expected, rel=0.05)  # XLA pads the operand of a reduce-scatter


def test_a_weight_gather_is_hidden_by_a_product_that_is_long_enough(tpus):
    gather = functools.partial(lax.all_gather, axis_name=("a", "b"), axis=0, tiled=True)
    wide, short = TOKENS, 256

    def function(x_ND, w_LDD, v_LDD):
        def body(x, weights):
            w, v = weights
            x = jnp.tanh(x @ w)  # needs no communication, so it can overlap with the gather of v
            return jnp.tanh(x @ gather(v)), None

        return lax.scan(body, x_ND, (w_LDD, v_LDD))[0]

    split_columns = PartitionSpec(None, ("a", "b"))
    seconds = {}
    for tokens in (wide, short):
        shapes = ((4 * tokens, D), (LAYERS, D, D), (LAYERS, D, D))
        timeline = timeline_of(function, "v5p", tpus, shapes, (SPLIT, REPLICATED, split_columns), SPLIT)
        assert sum(use.wire for use in timeline.uses.values()) == LAYERS * D * D * 2 * 3 / 4
        exposed = sum(use.exposed for use in timeline.uses.values() if use.exposed > 1e-5)
        product = 2 * tokens * D * D / 459e12
        transfer = D * D * 2 * 3 / 4 / (2 * 90e9)  # a corner of the square has two links
        seconds[tokens] = exposed / LAYERS, max(0.0, transfer - product)
    assert seconds[wide][0] < 0.05 * transfer
    assert seconds[short][0] == pytest.approx(seconds[short][1], rel=0.15)
