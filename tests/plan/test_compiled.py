"""Programs compiled for real TPUs whose FLOPs, bytes and times are known beforehand."""

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
from dsv2_jax.plan.program import _as_calls
from dsv2_jax.plan.timeline import play
from pallas_kernels.chips import CHIPS

pytestmark = pytest.mark.tpu
D, LAYERS, TOKENS = 4096, 7, 16_384  # tokens of each of the four chips
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def played(function, chip, tpus, arguments, specs, out):
    """The timeline of a function under shard_map on four chips in a square; arguments as shapes in bfloat16."""
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
        module = hlo.parse(_as_calls(printed.read_text()))
    torus = network.Torus(CHIPS[chip], tuple(network.place(device) for device in mesh.devices.flat))
    return play(module, torus, lambda *_: 0.0)


def layers(x_ND, w_LDD):
    """Two products a turn: with one, XLA copies the carry."""
    return lax.scan(lambda x, w: (x @ w @ w.T, None), x_ND, w_LDD)[0]


SPLIT, ALIKE = PartitionSpec(("a", "b")), PartitionSpec()


@pytest.mark.parametrize(("chip", "error"), [("v5e", 0.3), ("v5p", 0.3), ("v6e", 0.9)])
def test_products_in_loops_take_their_flops_at_the_peak(tpus, chip, error):
    """Never less, and more by what XLA itself says that it loses; loops in loops are counted by their turns."""

    def function(x_ND, w_LDD, repeats):
        return lax.scan(lambda x, _: (layers(x, w_LDD), None), x_ND, length=repeats)[0]

    shapes, specs = ((4 * TOKENS, D), (LAYERS, D, D)), (SPLIT, ALIKE)
    seconds = {}
    for repeats in (1, 5):
        timeline = played(functools.partial(function, repeats=repeats), chip, tpus, shapes, specs, SPLIT)
        ideal = repeats * LAYERS * 4 * TOKENS * D * D / (CHIPS[chip].peak * CHIPS[chip].cores)
        seconds[repeats] = timeline.seconds
        print(f"{chip}, {repeats} x {LAYERS} x 2 products: {timeline.seconds / ideal - 1:+.1%} to the peak")
        assert ideal < timeline.seconds < (1 + error) * ideal
        assert not timeline.unsolved
    assert seconds[5] == pytest.approx(5 * seconds[1], rel=0.03)


def test_what_every_collective_sends(tpus):
    def function(x_ND):
        def turn(x, _):
            everything = lax.all_gather(x, ("a", "b"), axis=0, tiled=True)
            x = lax.psum_scatter(everything, ("a", "b"), scatter_dimension=0, tiled=True)
            x = lax.all_to_all(x, ("a", "b"), 0, 1, tiled=True).reshape(x.shape)
            x = lax.ppermute(x, ("a", "b"), [(i, (i + 1) % 4) for i in range(4)])
            return x + lax.psum(x, ("a", "b")), None

        return lax.scan(turn, x_ND, length=6)[0]

    timeline = played(function, "v5p", tpus, [(4 * TOKENS, D)], [SPLIT], SPLIT)
    wires = sorted(use.wire for use in timeline.uses.values() if use.wire)
    own = 6 * TOKENS * D * 2
    expected = sorted(own * share for share in (3, 3, 3 / 4, 1, 2 * 3 / 4))
    assert wires == pytest.approx(expected, rel=0.05)  # XLA pads what it scatters


def test_weights_are_gathered_beside_the_work_and_hidden_where_it_is_long_enough(tpus):
    whole = functools.partial(lax.all_gather, axis_name=("a", "b"), axis=0, tiled=True)
    wide, short = TOKENS, 256

    def function(x_ND, w_LDD, v_LDD):
        def turn(x, weights):
            w, v = weights
            x = jnp.tanh(x @ w)  # needs nothing of others: time for v to come
            return jnp.tanh(x @ whole(v)), None

        return lax.scan(turn, x_ND, (w_LDD, v_LDD))[0]

    shard = PartitionSpec(None, ("a", "b"))
    seconds = {}
    for tokens in (wide, short):
        shapes = ((4 * tokens, D), (LAYERS, D, D), (LAYERS, D, D))
        timeline = played(function, "v5p", tpus, shapes, (SPLIT, ALIKE, shard), SPLIT)
        assert sum(use.wire for use in timeline.uses.values()) == LAYERS * D * D * 2 * 3 / 4
        exposed = sum(use.exposed for use in timeline.uses.values() if use.exposed > 1e-5)
        product = 2 * tokens * D * D / 459e12
        transfer = D * D * 2 * 3 / 4 / (2 * 90e9)  # a corner of the square has two links
        seconds[tokens] = exposed / LAYERS, max(0.0, transfer - product)
    assert seconds[wide][0] < 0.05 * transfer
    assert seconds[short][0] == pytest.approx(seconds[short][1], rel=0.15)
