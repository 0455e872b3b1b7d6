"""Grouped experts against every expert on every token in float64, forward and gradients."""

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import exact

from dsv2_jax.ops.cpu import experts as cpu

E, D, F = 5, 6, 4


def _dense(x, experts, gates, w_gate, w_up, w_down):
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w_gate)) * jnp.einsum("nd,edf->nef", x, w_up)
    y = jnp.einsum("nef,efd->ned", hidden, w_down)
    return jnp.einsum("nk,nke,ned->nd", gates.astype(y.dtype), jax.nn.one_hot(experts, len(w_gate), dtype=y.dtype), y)


def _grouped(x, experts, gates, *weights):
    return cpu.grouped_swiglu(x, experts, gates, weights)


def _case(n, k, dtype, seed=0, experts=None, d=D, f=F):
    rng = np.random.default_rng(seed)
    if experts is None:
        experts = np.stack([rng.permutation(E)[:k] for _ in range(n)])
    weights = [jnp.asarray(rng.standard_normal(s) * 0.5, dtype) for s in ((E, d, f), (E, d, f), (E, f, d))]
    x, g = (jnp.asarray(rng.standard_normal((n, d)), dtype) for _ in range(2))
    gates = jnp.asarray(rng.random((n, k)) + 0.1, jnp.float32)
    return (x, jnp.asarray(experts, jnp.int32), gates, *weights), g


def _vjp(f, case, g):
    x, experts, *rest = case
    y, pull = jax.vjp(lambda x, *rest: f(x, experts, *rest), x, *rest)
    return [y, *pull(g)]


def _true(case, g):
    with jax.enable_x64(True):
        wide = [a if a.dtype == jnp.int32 else jnp.asarray(np.asarray(a, np.float64)) for a in (*case, g)]
        return [np.asarray(a) for a in _vjp(_dense, wide[:-1], wide[-1])]


def _errors(got, true):
    return [
        float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-3))
        for a, b in zip(got, true, strict=True)
    ]


def _skewed(n):
    """All of the first choices to expert 3, the others to 1 and 4: 0 and 2 stay empty."""
    return np.stack([np.array([3, 1 + 3 * (i % 2)]) for i in range(n)])


def _uneven(n):
    """All of the first choices to expert 3, the others spread over the rest: none is empty."""
    return np.stack([np.array([3, (0, 1, 2, 4)[i % 4]]) for i in range(n)])


def _dropping(n):
    experts = _skewed(n)
    experts[::3, 0] = E
    experts[1::4, :] = E
    return experts


CASES = {
    "one token": (1, 3, None),
    "few": (7, 2, None),
    "few, dropping": (9, 2, _dropping(9)),
    "some": (20, 2, None),
    "some more": (60, 2, None),
    "one beyond its share": (40, 2, _uneven(40)),
    "many": (301, 3, None),
    "many, skewed": (333, 2, _skewed(333)),
    "many, dropping": (333, 2, _dropping(333)),
    "all dropped": (200, 2, np.full((200, 2), E)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_dense(name):
    n, k, experts = CASES[name]
    case, g = _case(n, k, jnp.float32, experts=experts)
    true = _true(case, g)
    assert max(_errors([jax.jit(_grouped)(*case)], true[:1])) < 3e-6
    got = jax.jit(lambda case, g: _vjp(_grouped, case, g))(case, g)
    assert max(_errors(got, true)) < 3e-6
    for a, t in zip(got, _bounded(case, g), strict=True):
        bounds.check(a, t)
    assert (np.asarray(got[2])[np.asarray(case[1]) == E] == 0).all()


def _bounded(case, g):
    """The truth with the bounds of the dtype."""
    x, experts, gates, *weights = (a if a.dtype == jnp.int32 else exact(a) for a in case)
    return bounds.grouped_swiglu(x, np.asarray(experts), gates, tuple(weights), exact(g), g.dtype)


@pytest.mark.parametrize("n", [16, 400])
def test_bfloat16_stays_within_its_bounds(n):
    """And a scale that is off by 1e-2 does not."""
    case, g = _case(n, 3, jnp.bfloat16, d=64, f=32)
    got = _vjp(_grouped, case, g)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 2 + [jnp.float32] + [jnp.bfloat16] * 3
    for a, t in zip(got, _bounded(case, g), strict=True):
        bounds.check(a, t)
        assert max(bounds.ratios(np.asarray(a, np.float64) * 1.01, t)) > 1


@pytest.mark.parametrize("n", [1, 4, 16, 60])
def test_bfloat16_without_a_backward_pass(n):
    case, g = _case(n, 3, jnp.bfloat16, d=64, f=32)
    # Gate, up, their product and the result are rounded to 8 bits, by 2^-9 each.
    assert _errors([jax.jit(_grouped)(*case)], _true(case, g)[:1])[0] < 2**-7


def test_remat_in_a_scan_changes_nothing():
    case, g = _case(150, 2, jnp.float32)
    want = _vjp(_grouped, case, g)

    def layers(x, experts, *rest):
        def layer(x, rest):
            return _grouped(x, experts, *rest), None

        return jax.lax.scan(jax.checkpoint(layer), x, jax.tree.map(lambda a: a[None], rest))[0]

    for a, b in zip(_vjp(layers, case, g), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_cost_follows_pairs_not_experts():
    """Dropped pairs and idle experts run no block, by the compiled loop's own count of blocks."""
    pairs = cpu._sort(jnp.asarray(_dropping(300), jnp.int32), E, 0)
    kept = int((_dropping(300) < E).sum())
    assert int(pairs.counts_E.sum()) == kept and int(pairs.counts_E[0]) == int(pairs.counts_E[2]) == 0
    rows = 0

    def body(size, _row, _left, carry):
        return (carry[0] + size,)

    for e in range(E):
        rows += int(cpu._over_blocks(pairs, cpu._BLOCKS, jnp.int32(e), body, (jnp.int32(0),))[0])
    assert kept <= rows < kept + E * 128
