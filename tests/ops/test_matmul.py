"""Weight products and their gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.ops.matmul import project, weight_gradient


@pytest.mark.parametrize(("x_shape", "w_shape", "axes"), [((2, 3, 6), (6, 4, 5), 1), ((7, 4, 5), (4, 5, 6), 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_project_and_gradients(x_shape, w_shape, axes, dtype, tolerance):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in (x_shape, w_shape))
    y, pull = jax.vjp(lambda x, w: project(x, w, axes), x, w)
    g = jnp.asarray(rng.standard_normal(y.shape), dtype)
    dx, dw = jax.jit(pull)(g)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    lead = x.ndim - axes
    want = (
        np.tensordot(x64, w64, axes),
        np.tensordot(g64, w64, (list(range(lead, y.ndim)), list(range(axes, w.ndim)))),
        np.tensordot(x64, g64, (list(range(lead)), list(range(lead)))),
    )
    for got, true in zip((y, dx, dw), want, strict=True):
        assert got.dtype == dtype and got.shape == true.shape
        assert np.abs(np.asarray(got, np.float64) - true).max() <= tolerance * np.abs(true).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 3), (9, 7, 5), (33, 10, 4)])
def test_weight_gradient_sums_in_float32(shape, dtype):
    n, d, f = shape
    rng = np.random.default_rng(1)
    x, g = jnp.asarray(rng.standard_normal((n, d)), dtype), jnp.asarray(rng.standard_normal((n, f)), dtype)
    got = jax.jit(weight_gradient)(x, g)
    true = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got) - true).max() <= 1e-6 * np.abs(true).max() * 4
