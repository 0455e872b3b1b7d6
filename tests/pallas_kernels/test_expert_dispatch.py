"""Grouped products and the experts' SwiGLU: kernels and plain twins against float64; kernels compile for TPUs."""

import dataclasses
import itertools
import os

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import exact, product
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.expert_dispatch import grouped_swiglu, kernels, reference
from pallas_kernels.expert_dispatch.tiles import Tiles
from pallas_kernels.pricing.shapes import EXPERT_DECODE, EXPERT_DISPATCH, ExpertDispatch
from pallas_kernels.quantized import Quantized

E, D, F, P = 5, 128, 384, 200
SIZES = {
    "uneven": [70, 0, 3, 90, 37],
    "one row": [0, 0, 1, 0, 0],
    "all in one": [0, 200, 0, 0, 0],
    "none": [0, 0, 0, 0, 0],
    "single rows": [1, 1, 1, 1, 1],
    "aligned": [64, 16, 0, 32, 16],
}
OPS = {"pallas": kernels, "xla": reference}
SWIGLU = {"pallas": grouped_swiglu, "xla": reference.grouped_swiglu}


@pytest.fixture
def interpreted():
    """Runs kernels in TPU interpret mode, which finds races; memory is NaN until it is written."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
        assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found


def _normal(rng, *shape):
    return rng.standard_normal(shape)


def _check(got, true, what):
    """Every result is within the bound of its own sums."""
    for number, (a, t) in enumerate(zip(got, true, strict=True)):
        bounds.check(a, t, (what, number))


def _ops_case(dtype, sizes, seed=0):
    """Operands with NaN in the rows after the groups, and the true results of every op with their bounds."""
    rng, total = np.random.default_rng(seed), sum(sizes)
    draws = [_normal(rng, P, D), _normal(rng, E, D, F) / 8, _normal(rng, E, D, F) / 8]
    draws += [_normal(rng, P, F), _normal(rng, P, F), rng.random(P), _normal(rng, E, F, D) / 8]
    x, w, v, a, u, s, down = (jnp.asarray(d, jnp.float32 if i == 5 else dtype) for i, d in enumerate(draws))
    x, a, u, s = (r.at[total:].set(jnp.nan) for r in (x, a, u, s))
    case = {"x": x, "w": w, "v": v, "a": a, "u": u, "s": s, "down": down, "sizes": jnp.asarray(sizes, jnp.int32)}
    return case, _true_ops({name: exact(r) for name, r in case.items()}, sizes, dtype)


def _true_ops(c, sizes, dtype):
    """The true results of every op. c: the operands as numbers with bounds."""
    total, ids = sum(sizes), np.repeat(np.arange(E), sizes)
    groups = [ids == e for e in range(E)]
    x, a, u, s = (c[name][:total] for name in "xaus")
    s = s[:, None]
    gate, up = _grouped(x, c["w"], sizes), _grouped(x, c["v"], sizes)
    dh, (silu, by_a) = _grouped(x, c["down"], sizes, transposed=True), bounds.silu(a)
    true = {
        "gmm": [gate],
        "gmm_sum": [_grouped(a, c["w"], sizes, transposed=True) + _grouped(u, c["v"], sizes, transposed=True)],
        "tgmm_each": [bounds.stack([product("pd,pf->df", x[g], r[g]) for g in groups]) for r in (a, u)],
        "gate_up": [bounds.silu(gate)[0] * up * s, gate, up],
        "hidden_gradient": [dh * s * u * by_a, dh * s * silu, silu * u * s],
    }
    true = {name: [result.to(dtype) for result in results] for name, results in true.items()}
    true["hidden_gradient"].append((silu * u * dh).sum(1))
    return true


def _grouped(x, w, sizes, transposed=False):
    """Each row times its group's matrix."""
    how = "pf,df->pd" if transposed else "pd,df->pf"
    starts = np.cumsum([0, *sizes])
    return bounds.concatenate([product(how, x[a:b], w[e]) for e, (a, b) in enumerate(itertools.pairwise(starts))])


def _run(ops, c):
    """Every op on a case, with tiles that do not divide the groups and two overlapping column blocks."""
    row = {"tiles": Tiles(rows=64, step=32, chunk=128, blocks=2)} if ops is kernels else {}
    weight = {"tiles": Tiles(rows=64, step=32, chunk=128, blocks=1)} if ops is kernels else {}
    return {
        "gmm": [ops.gmm(c["x"], c["w"], c["sizes"], **row)],
        "gmm_sum": [ops.gmm_sum((c["a"], c["u"]), (c["w"], c["v"]), c["sizes"], transpose_rhs=True, **weight)],
        "tgmm_each": ops.tgmm_each(c["x"], (c["a"], c["u"]), c["sizes"], **weight),
        "gate_up": ops.gate_up(c["x"], c["w"], c["v"], c["s"], c["sizes"], keep=True, **row),
        "hidden_gradient": ops.hidden_gradient(c["x"], c["down"], c["a"], c["u"], c["s"], c["sizes"], **row),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", OPS)
def test_building_blocks(implementation, dtype):
    dtype = jnp.dtype(dtype)
    run = jax.jit(lambda c: _run(OPS[implementation], c))
    for sizes in SIZES.values():
        case, true = _ops_case(dtype, sizes)
        got = run(case)
        for name, results in true.items():
            rows = slice(None) if name == "tgmm_each" else slice(sum(sizes))
            _check([r[rows] for r in got[name]], results, (name, sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_faults_of_the_building_blocks_are_found(dtype):
    """The bounds find a scale off by 1e-4 (bfloat16: 1e-3), and one product missing in a sum."""
    dtype, sizes = jnp.dtype(dtype), SIZES["uneven"]
    case, true = _ops_case(dtype, sizes)
    rows = {name: slice(None) if name == "tgmm_each" else slice(sum(sizes)) for name in true}
    got = jax.jit(lambda c: _run(reference, c))(case)
    poorer = case | {name: case[name].at[..., 5].set(0) for name in ("x", "a")} | {"a": case["a"].at[:, 7].set(0)}
    lacking = jax.jit(lambda c: _run(reference, c))(poorer | {"x": poorer["x"].at[3].set(0)})
    for name, results in true.items():
        for i, t in enumerate(results):
            r = np.asarray(got[name][i][rows[name]], np.float64)
            assert max(bounds.ratios(r, t)) <= 1
            assert max(bounds.ratios(r * (1 + (1e-4 if dtype == "float32" or r.ndim == 1 else 1e-3)), t)) > 1, (name, i)
            assert max(bounds.ratios(lacking[name][i][rows[name]], t)) > 1, (name, i)


def _quantized(rng, shape, kind):
    """A weight in 8 bits and its values in float64. float8 has every bit pattern but NaN; some channels have only
    subnormal numbers, with scales that make them as large as the others."""
    if kind == "int8":
        values = rng.integers(-127, 128, shape).astype(np.int8)
    else:
        bits = rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)
        bits[..., ::5] &= 0x87
        values = bits.astype(np.uint8).view(kind)
    wide = values.astype(np.float64)
    size = np.sqrt(np.mean(wide**2, axis=1, keepdims=True))
    scale = np.float32((0.5 + rng.random(size.shape)) / (8 * size))
    return Quantized(jnp.asarray(values), jnp.asarray(scale)), wide * scale


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "int8"), ("bfloat16", "float8_e4m3fn")])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", OPS)
def test_weights_in_8_bits(implementation, dtype, kind):
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    (gate, gate_true), (up, up_true), (down, down_true) = (
        _quantized(rng, s, kind) for s in [(E, D, F), (E, D, F), (E, F, D)]
    )
    ops = OPS[implementation]
    tiles = {"tiles": Tiles(rows=64, step=64, chunk=128, blocks=2)} if ops is kernels else {}

    @jax.jit
    def run(c):
        (hidden,) = ops.gate_up(c["x"], gate, up, c["s"], c["sizes"], **tiles)
        return [hidden, ops.gmm(c["a"], down, c["sizes"], **tiles)]

    one = exact(1.0)  # makes the product of sum and scale a rounded one
    for name in ("uneven", "none"):
        case, _ = _ops_case(dtype, SIZES[name])
        total = sum(SIZES[name])
        x, a, s = (exact(case[r])[:total] for r in "xas")
        g, u = (_grouped(x, exact(w), SIZES[name]) * one for w in (gate_true, up_true))
        hidden = bounds.silu(g)[0] * u * s[:, None]
        true = [hidden.to(dtype), (_grouped(a, exact(down_true), SIZES[name]) * one).to(dtype)]
        _check([r[:total] for r in run(case)], true, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", OPS)
def test_rows_are_added_up_by_token(implementation, dtype):
    """With more tokens than a group of the kernel, and NaN in rows that no pair keeps."""
    rng, dtype, (n, k, p) = np.random.default_rng(0), jnp.dtype(dtype), (300, 3, 480)
    for share in (0.0, 0.4):
        kept = rng.random((n, k)) < share
        kept[:, 0] &= np.arange(n) % 7 > 0  # some tokens have none
        rows = np.zeros((n, k), np.int32)
        rows[kept] = rng.permutation(p)[: kept.sum()]
        y = jnp.asarray(_normal(rng, p, D), dtype).at[np.setdiff1d(np.arange(p), rows[kept])].set(jnp.nan)
        true = exact(np.where(kept[..., None], np.asarray(y, np.float64)[rows], 0)).sum(1).to(dtype)
        got = jax.jit(OPS[implementation].combine)(y, jnp.asarray(rows), jnp.asarray(kept))
        bounds.check(got, true, share)


def _dense(x, experts, gates, w_gate, w_up, w_down):
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w_gate)) * jnp.einsum("nd,edf->nef", x, w_up)
    y = jnp.einsum("nef,efd->ned", hidden, w_down)
    return jnp.einsum("nk,nke,ned->nd", gates.astype(y.dtype), jax.nn.one_hot(experts, E, dtype=y.dtype), y)


def _vjp(f, x, experts, rest, g):
    y, pull = jax.vjp(lambda x, *rest: f(x, experts, *rest), x, *rest)
    return [y, *pull(g)]


def _skewed(n):
    """All first choices are expert 3, the second 1 and 4; experts 0 and 2 have no pair."""
    return np.stack([np.array([3, 1 + 3 * (i % 2)]) for i in range(n)])


def _dropping(n):
    experts = _skewed(n)
    experts[::3, 0] = E
    experts[1::4, :] = E
    return experts


def _shuffled(n, k):
    return np.stack([np.random.default_rng(i).permutation(E)[:k] for i in range(n)])


def _bounded(experts, max_pairs):
    """The choices with all but the first `max_pairs` pairs, by expert, dropped."""
    kept = experts.flatten()
    kept[np.argsort(kept, kind="stable")[max_pairs or kept.size :]] = E
    return kept.reshape(experts.shape)


CASES = {  # experts_NK, max_pairs, buffer_size
    "one token": ([_shuffled(1, 3)], None, None),
    "many": ([_shuffled(70, 2), _skewed(70), _dropping(70), np.full((70, 2), E)], None, None),
    "bound on pairs": ([_dropping(70)], 80, None),
    "chunks": ([_dropping(70), np.full((70, 2), E)], 80, 32),  # three chunks that split experts, and none
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one token", "float32"),
        pytest.param("many", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bound on pairs", "float32", marks=pytest.mark.slow),
        pytest.param("chunks", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", OPS)
def test_grouped_swiglu(implementation, name, dtype):
    dtype, (routings, max_pairs, buffer_size) = jnp.dtype(dtype), CASES[name]
    n, k = routings[0].shape
    rng = np.random.default_rng(0)
    x, g, *weights = (
        jnp.asarray(_normal(rng, *s) / scale, dtype)
        for s, scale in [((n, D), 1), ((n, D), 1), ((E, D, F), 8), ((E, D, F), 8), ((E, F, D), 8)]
    )
    gates = jnp.asarray(rng.random((n, k)) + 0.1, jnp.float32)

    def op(x, experts, gates, *weights):
        return SWIGLU[implementation](x, experts, gates, weights, max_pairs=max_pairs, buffer_size=buffer_size)

    run = jax.jit(lambda experts: _vjp(op, x, experts, (gates, *weights), g))
    chunks = -(-max_pairs // buffer_size) if buffer_size else 1
    for experts in routings:
        got, kept = run(jnp.asarray(experts, jnp.int32)), _bounded(experts, max_pairs)
        assert [a.dtype for a in got] == [dtype, dtype, jnp.float32, dtype, dtype, dtype]
        wide = [exact(a) for a in (x, gates, *weights, g)]
        true = bounds.grouped_swiglu(wide[0], kept, wide[1], tuple(wide[2:5]), wide[5], dtype, chunks)
        _check(got, true, name)
        with jax.enable_x64(True):  # autodiff gives the same gradients
            arrays = [jnp.asarray(a.value) for a in wide]
            found = _vjp(_dense, arrays[0], jnp.asarray(kept), arrays[1:-1], arrays[-1])
        for a, t in zip(found, true, strict=True):
            np.testing.assert_allclose(a, t.value, atol=1e-12 * np.abs(t.value).max(initial=1e-3))
        assert (np.asarray(got[2])[kept == E] == 0).all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", [pytest.param("pallas", marks=pytest.mark.slow), "xla"])
def test_grouped_swiglu_in_8_bits(implementation):
    """With widths that are not multiples of 128, and dropped pairs."""
    rng, (n, k), (depth, width) = np.random.default_rng(0), (40, 2), (96, 160)
    experts, gates = _dropping(n), rng.random((n, k)) + 0.1
    x = jnp.asarray(_normal(rng, n, depth), jnp.bfloat16)
    weights, wide = zip(
        *(_quantized(rng, s, "int8") for s in [(E, depth, width), (E, depth, width), (E, width, depth)]), strict=True
    )

    def run(x, implementation):
        routing = jnp.asarray(experts, jnp.int32), jnp.asarray(gates, jnp.float32)
        return SWIGLU[implementation](x, *routing, weights)

    numbers = [exact(a) for a in (x, np.float32(gates), *wide)]
    true = bounds.grouped_swiglu(numbers[0], experts, numbers[1], tuple(numbers[2:]), numbers[0], x.dtype)[0]
    got = jax.jit(run, static_argnums=1)(x, implementation)
    assert got.dtype == x.dtype
    bounds.check(got, true, implementation)


def test_wrong_arguments_raise():
    x = jnp.zeros((4, 96))
    routing = jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2))
    up, down = (Quantized(jnp.zeros(s, jnp.int8), jnp.ones((E, 1, s[2]))) for s in ((E, 96, 128), (E, 128, 96)))
    with pytest.raises(ValueError, match="no gradient"):
        jax.grad(lambda x: grouped_swiglu(x, *routing, (up, up, down)).sum())(x)
    with pytest.raises(ValueError, match="powers of two"):
        Tiles(rows=96, step=32, chunk=128)


def _compile(topology, monkeypatch, function, *args):
    """Compiles for a TPU that is not attached and returns the number of kernels. args: trees of (shape, dtype)."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    mesh = Mesh(np.array([device]), "x", axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        here = NamedSharding(mesh, PartitionSpec())
        lowered = jax.jit(function).lower(
            *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
        )
        # jaxlib cannot parse libtpu's text of SparseCore programs
        options = ["xla_tpu_offload_gather_to_sparsecore", "xla_tpu_enable_offloading_scatter_to_sparsecore"]
        lowered.compile(compiler_options=dict.fromkeys(options, False))
    return lowered.as_text().count("tpu_custom_call")


TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def _operands(size: ExpertDispatch) -> tuple:
    """(tokens, [experts, gates], shapes of the three weights)."""
    routing = [jax.ShapeDtypeStruct((size.tokens, size.active), d) for d in (jnp.int32, jnp.float32)]
    up, down = (size.experts, size.hidden, size.width), (size.experts, size.width, size.hidden)
    return jax.ShapeDtypeStruct((size.tokens, size.hidden), jnp.bfloat16), routing, [up, up, down]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "shape", "tokens"),
    # v2 takes minutes: its tiles are the largest. 64 tokens have small ones. `benchmarks/kernels.py` compiles all.
    [*((topology, "nano", 1024) for topology in TOPOLOGIES), ("v5p:2x2x1", "v2", 1024), ("v6e:2x2", "v2_lite", 64)],
)
def test_compiles_for_tpus(topology, shape, tokens, monkeypatch):
    """With the widths of the models; more tokens would repeat the same tiles."""
    size = EXPERT_DISPATCH[shape]
    size = dataclasses.replace(size, tokens=tokens, rows=tokens * size.rows // size.tokens)

    def gradients(x, experts, gates, w_gate, w_up, w_down, g):
        def op(x, gates, *weights):
            return grouped_swiglu(x, experts, gates, weights, max_pairs=size.rows)

        y, pull = jax.vjp(op, x, gates, w_gate, w_up, w_down)
        return y, pull(g)

    x, routing, shapes = _operands(size)
    weights = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    assert _compile(topology, monkeypatch, gradients, x, *routing, *weights, x) == 8


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "kind", "shape"),
    [
        *((topology, kind, "nano") for topology in TOPOLOGIES for kind in ("int8", "float8_e4m3fn")),
        ("v5p:2x2x1", "int8", "v2_decode"),
    ],
)
def test_weights_in_8_bits_compile_for_tpus(topology, kind, shape, monkeypatch):
    def op(x, experts, gates, *weights):
        return grouped_swiglu(x, experts, gates, weights)

    tokens, routing, shapes = _operands((EXPERT_DISPATCH | EXPERT_DECODE)[shape])
    weights = [
        Quantized(jax.ShapeDtypeStruct(s, kind), jax.ShapeDtypeStruct((s[0], 1, s[2]), jnp.float32)) for s in shapes
    ]
    assert _compile(topology, monkeypatch, op, tokens, *routing, *weights) == 3
