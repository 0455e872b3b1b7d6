"""Attention in blocks against a dense float64 softmax, forward and gradients."""

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.ops.cpu.attention import attention


def _dense(q, k, v, scale, segments_t, segments_s, offset):
    """The definition, one head at a time, in whatever precision its inputs have."""
    t, h, s, j = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    k, v = (jnp.repeat(a, h // j, axis=2) for a in (k, v))
    sees = (jnp.arange(s)[None] <= jnp.arange(t)[:, None] + offset) & (segments_t[:, :, None] == segments_s[:, None])
    scores = jnp.where(sees[:, None], jnp.einsum("bthk,bshk->bhts", q, k) * scale, -np.inf)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)


def _case(b, t, s, h, j, dtype, width=6, v_width=4):
    rng = np.random.default_rng(t + s)
    shapes = (b, t, h, width), (b, s, j, width), (b, s, j, v_width), (b, t, h, v_width)
    return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def _errors(got, true):
    return [
        float(np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-3))
        for a, b in zip(got, true, strict=True)
    ]


def _true(q, k, v, g, *rest):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v)]
        o, pull = jax.vjp(lambda q, k, v: _dense(q, k, v, *rest), *wide)
        return [np.asarray(a) for a in (o, *pull(jnp.asarray(np.asarray(g, np.float64))))]


def _run(q, k, v, g, scale, segments_t, segments_s, offset):
    def f(q, k, v):
        return attention(q, k, v, scale=scale, segments_BT=segments_t, segments_BS=segments_s, offset=offset)

    o, pull = jax.vjp(f, q, k, v)
    return [o, *jax.jit(pull)(g)]


@pytest.mark.parametrize(("t", "h", "j"), [(2, 2, 2), (130, 2, 2), (300, 4, 2), (257, 3, 1)])
def test_packed_rows(t, h, j):
    q, k, v, g = _case(2, t, t, h, j, jnp.float32)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, t)), axis=1), jnp.int32)
    case = (0.4, segments, segments, 0)
    assert max(_errors(_run(q, k, v, g, *case), _true(q, k, v, g, *case))) < 3e-6


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("t", "s", "offset"), [(1, 9, 5), (3, 9, 4), (4, 9, 0), (130, 1100, 700)])
def test_queries_against_a_longer_cache(t, s, offset, traced):
    q, k, v, g = _case(2, t, s, 4, 2, jnp.float32)
    segments_t, segments_s = jnp.ones((2, t), jnp.int32), jnp.asarray([[1] * s, [0, 0] + [1] * (s - 2)], jnp.int32)
    segments_t = segments_t.at[1, 0].set(0) if offset == 0 else segments_t
    segments_t = segments_t.at[1, 1].set(0) if offset == 0 else segments_t
    true = _true(q, k, v, g, 0.3, segments_t, segments_s, offset)
    at = jnp.int32(offset) if traced else offset
    assert max(_errors(_run(q, k, v, g, 0.3, segments_t, segments_s, at), true)) < 3e-6


def _bounded(q, k, v, g, scale, dtype):
    """The truth with the bounds of the dtype, of rows that are one document."""
    heads = (bounds.exact(np.swapaxes(np.asarray(a, np.float64), 1, 2)) for a in (q, k, v, g))
    sees = np.tri(q.shape[1], dtype=bool)[None, None]
    return [t.to(dtype).each(lambda a: a.swapaxes(1, 2)) for t in bounds.attention(*heads, sees, scale, dtype)]


@pytest.mark.parametrize(("dtype", "off"), [(jnp.float32, 1e-4), (jnp.bfloat16, 8e-3)])
def test_one_document_stays_within_the_bounds_of_its_dtype(dtype, off):
    """And a scale that is a little off does not."""
    q, k, v, g = _case(1, 200, 200, 2, 2, dtype, 32, 16)
    segments = jnp.ones((1, 200), jnp.int32)
    got = _run(q, k, v, g, 32**-0.5, segments, segments, 0)
    assert all(a.dtype == dtype for a in got)
    for a, t in zip(got, _bounded(q, k, v, g, 32**-0.5, dtype), strict=True):
        bounds.check(a, t)
        assert max(bounds.ratios(np.asarray(a, np.float64) * (1 + off), t)) > 1


def test_padding_stays_finite_and_remat_in_a_scan_changes_nothing():
    q, k, v, g = _case(1, 140, 140, 2, 2, jnp.float32)
    segments = jnp.asarray([[1] * 100 + [0] * 40], jnp.int32)
    case = (0.4, segments, segments, 0)
    want = _run(q, k, v, g, *case)
    assert all(np.isfinite(np.asarray(a)).all() for a in want)

    def f(q, k, v):
        def layer(carry, _):
            return carry, attention(q, k, v, scale=0.4, segments_BT=segments, segments_BS=segments)

        return jax.lax.scan(jax.checkpoint(layer), 0.0, length=1)[1][0]

    o, pull = jax.vjp(f, q, k, v)
    for a, b in zip([o, *pull(g)], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
