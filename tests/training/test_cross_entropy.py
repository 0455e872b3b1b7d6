"""Chunked cross-entropy against the full softmax in float64, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.training.cross_entropy import cross_entropy, token_log_probabilities


def _case(n, dtype, d=6, w=11):
    rng = np.random.default_rng(n)
    return (
        jnp.asarray(rng.standard_normal((n, d)), dtype),
        jnp.asarray(rng.standard_normal((d, w)), dtype),
        jnp.asarray(rng.integers(0, w, n), jnp.int32),
        jnp.asarray(rng.random(n) * (rng.random(n) > 0.3), jnp.float32),
    )


def _truth(h, w, targets, weights):
    h, w, weights = (np.asarray(a, np.float64) for a in (h, w, weights))
    logits = h @ w
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(h))
    nll = -(weights * np.log(p[rows, targets])).sum()
    p[rows, targets] -= 1
    p *= weights[:, None]
    return nll, p @ w.T, h.T @ p


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("n", [1, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_loss_and_gradients(n, chunk, dtype, tolerance):
    h, w, targets, weights = _case(n, dtype)

    def loss(h, w):
        return 0.5 * cross_entropy(h, w, targets, weights, chunk)

    nll, (dh, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, w)
    want = _truth(h, w, np.asarray(targets), weights)
    assert nll.dtype == jnp.float32 and dh.dtype == dw.dtype == dtype
    plain = jax.jit(lambda: cross_entropy(h, w, targets, weights, chunk))()
    for got, true in zip((2 * nll, plain, 2 * dh, 2 * dw), (want[0], *want), strict=True):
        scale = max(np.abs(true).max(), 1e-3)
        assert np.abs(np.asarray(got, np.float64) - true).max() <= tolerance * scale


def test_logits_exist_for_one_chunk_only():
    n, d, w, chunk = 512, 8, 4096, 32
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((n, d), jnp.float32), ((d, w), jnp.float32), ((n,), jnp.int32), ((n,), jnp.float32))
    ]
    step = jax.jit(jax.grad(lambda *a: cross_entropy(*a, chunk), (0, 1)))
    assert step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < n * w * 4 / 2


@pytest.mark.parametrize("chunk", [3, 64])
def test_token_log_probabilities_and_their_gradients_against_float64(chunk):
    random = np.random.default_rng(0)
    h, w, targets = random.normal(size=(10, 6)), random.normal(size=(6, 13)), random.integers(0, 13, 10)
    weights = random.normal(size=10)
    logits = h @ w
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    g = weights[:, None] * (np.eye(13)[targets] - np.exp(logp))

    def weighed(h, w):
        found, entropy = token_log_probabilities(h, w, jnp.asarray(targets), chunk)
        return (found * weights).sum() + entropy.sum(), (found, entropy)

    arguments = jnp.asarray(h, jnp.float32), jnp.asarray(w, jnp.float32)
    (dh, dw), (found, entropy) = jax.grad(weighed, argnums=(0, 1), has_aux=True)(*arguments)
    np.testing.assert_allclose(found, logp[np.arange(10), targets], rtol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(logp) * logp).sum(1), rtol=1e-5)
    np.testing.assert_allclose(dh, g @ w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, h.T @ g, rtol=1e-4, atol=1e-5)
