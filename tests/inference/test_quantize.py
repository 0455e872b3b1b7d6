"""Quantised caches and weights: rounding, size in memory and what the engine computes with them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from dsv2_jax.config import SINGLE, Compute
from dsv2_jax.hf import load_params
from dsv2_jax.inference import quantize
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.ops import formats, pages
from dsv2_jax.ops.matmul import dequantize, project
from dsv2_jax.parameters import KEPT_FLOAT32
from pallas_kernels.latent_attention import packing
from pallas_kernels.quantized import Quantized

GOLDEN = Path(__file__).parent.parent / "golden" / "v2_tiny"
COMPUTE = Compute(dtype="float32", remat="none")


@pytest.mark.parametrize(("form", "largest"), [("int8", 127), ("int6", 31)])
def test_rows_come_back_within_half_a_step(form, largest):
    rows = np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32)
    rows *= np.array([1e-3, 1.0, 300.0])[:, None]
    rows[0, 0] = 0
    stored, scale = jax.jit(formats.quantize, static_argnums=1)(rows, form)
    assert (stored.dtype, scale.dtype) == (jnp.int8 if form == "int8" else jnp.uint8, jnp.float16)
    assert stored.shape == (5, 3, packing.width(64, stored.dtype))
    of_bytes, _ = packing.scales(packing.pair(scale, scale), stored.dtype)
    back = np.asarray(packing.dequantize(stored, of_bytes))
    step = np.asarray(scale, np.float64)[..., None]
    assert (np.abs(back - rows) <= 0.5001 * step).all()
    exact = np.maximum(np.abs(rows).max(-1, keepdims=True) / largest, 2.0**-14)
    assert (step >= exact * 0.9999999).all()  # nothing was clipped
    assert (step <= exact * 1.002).all()
    turned = packing.dequantize(jnp.swapaxes(stored, 1, 2), of_bytes, axis=1)
    np.testing.assert_array_equal(np.swapaxes(turned, 1, 2), back)


def test_four_numbers_fill_three_bytes():
    """By hand, with a scale of 1: -31 is 0b100001, whose pairs of bits follow the upper six of 1, 2 and 3."""
    stored, scale = formats.quantize(jnp.array([1.0, 2.0, 3.0, -31.0]), "int6")
    assert float(scale) == 1
    assert stored.tolist() == [1 << 2 | 0b10, 2 << 2 | 0b00, 3 << 2 | 0b01]
    with pytest.raises(ValueError, match="rows of 6 cannot be packed in 6 bits"):
        packing.width(6, jnp.uint8)


def test_two_scales_fill_a_word():
    """Every normal float16 comes back as it was, and no word gives anything but numbers."""
    scales = jnp.arange(0x0400, 0x7C00, dtype=jnp.uint16).view(jnp.float16)
    first, second = packing.scales(packing.pair(scales, scales[::-1]), jnp.int8)
    np.testing.assert_array_equal(first, scales.astype(jnp.float32))
    np.testing.assert_array_equal(second, scales[::-1].astype(jnp.float32))
    words = jnp.arange(0x10000, dtype=jnp.uint32) * 0x10001
    assert all(np.isfinite(found).all() for found in packing.scales(words, jnp.uint8))


@pytest.mark.parametrize(("form", "most"), [("int6", 6.5), ("int8", 8.5), ("bfloat16", 16.0)])
@pytest.mark.parametrize("name", ["v2", "nano"])
def test_bits_of_a_cached_number(name, form, most):
    """Everything included, in the shapes of V2 (576 numbers per token and layer) and of nano."""
    model = getattr(models, name)()
    made = jax.eval_shape(lambda: pages.empty(model, SINGLE, 10, 128, form, jnp.dtype(jnp.float32)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    assert 8 * size / (10 * 128 * model.cache_elements) <= most


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5 / 127), ("float8", 2.0**-4)])
def test_weights_come_back(kind, share):
    w = np.random.default_rng(1).standard_normal((24, 4, 10)).astype(np.float32)
    w[:, 1, 3] *= 1000  # its channel alone loses by it
    q = quantize.channelwise(jnp.asarray(w), (0,), kind)
    assert (q.values.dtype.itemsize, q.scale.shape) == (1, (1, 4, 10))
    error = np.abs(np.asarray(dequantize(q, jnp.dtype(jnp.float32))) - w)
    bound = np.abs(w).max(0) if kind == "int8" else np.maximum(np.abs(w), np.abs(w).max(0) * 2.0**-14)
    assert (error <= 1.001 * share * bound).all()
    x = np.random.default_rng(2).standard_normal((3, 24)).astype(np.float32)
    expected = np.einsum("td,dhr->thr", x.astype(np.float64), np.asarray(q.values, np.float64) * np.asarray(q.scale))
    np.testing.assert_allclose(project(jnp.asarray(x), q), expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def loaded():
    return load_params(GOLDEN)


@pytest.fixture(scope="module")
def ids():
    return np.load(GOLDEN / "golden.npz")["ids_long"][0, :60].tolist()


def logits(params, model, ids, **settings) -> np.ndarray:
    capacity = Capacity(rows=1, length=64, chunk=64, page=16, **settings)
    return Engine(params, model, compute=COMPUTE, capacity=capacity).logits(ids)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_quantized_weights_compute_what_they_stand_for(loaded, ids, kind):
    """The engine on weights in 8 bits, and on float32 weights of the same values."""
    model, params = loaded

    def same_values(path: tuple, w: jax.Array) -> jax.Array:
        name = path[-1].key
        if name.startswith(KEPT_FLOAT32):
            return w
        layers = path[0].key in ("dense", "moe")
        axes = tuple(axis + layers for axis in quantize.contracted(name))
        return dequantize(quantize.channelwise(w, axes, kind), jnp.dtype(jnp.float32))

    spelled = jax.jit(lambda p: jax.tree_util.tree_map_with_path(same_values, p))(params)
    mine = logits(params, model, ids, weights=kind)
    np.testing.assert_allclose(mine, logits(spelled, model, ids), atol=2e-4)
    assert np.abs(mine - logits(params, model, ids)).max() > 1e-3


def test_weights_take_a_quarter(loaded):
    model, params = loaded
    engine = Engine(params, model, compute=COMPUTE, capacity=Capacity(rows=1, length=64, page=16, weights="int8"))
    matrices = [
        leaf for part in engine._prepared.values() for name, leaf in part.items() if not name.startswith(KEPT_FLOAT32)
    ]
    assert matrices and all(isinstance(leaf, Quantized) for leaf in matrices)


def rounding(form: str, size: int) -> float:
    """What a format alone does to normal rows of this size, in their deviations: numpy's own arithmetic."""
    x = np.random.default_rng(0).standard_normal((1000, size))
    if form == "bfloat16":
        step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    else:
        step = np.abs(x).max(axis=1, keepdims=True) / {"int8": 127, "int6": 31}[form]
    return float(np.sqrt(((np.round(x / step) * step - x) ** 2).mean()))


@pytest.fixture(scope="module")
def errors(loaded, ids):
    """Of a token's logits with each cache, against float64, in their own deviation: the median of 60 tokens.

    Not the mean: where rounding sends a token to another expert, as it does some here, an error is of another kind.
    """
    model, params = loaded
    expected = np.load(GOLDEN / "golden.npz")["logits_long_np64"][0, :60]
    found = {form: logits(params, model, ids, cache=form) - expected for form in ("bfloat16", "int8", "int6")}
    return {form: np.median(np.sqrt((error**2).mean(axis=1))) / expected.std() for form, error in found.items()}


@pytest.mark.parametrize("form", ["int8", "int6"])
def test_a_cache_of_fewer_bits_costs_no_more_than_its_rounding(loaded, errors, form):
    """This random model answers a cache in bfloat16 with errors of a percent; others must cost in proportion, up to 2,
    for its rows are not quite normal."""
    size = loaded[0].attention.kv_lora_rank
    assert 1e-4 < errors["bfloat16"] < 0.03
    assert (
        errors["bfloat16"] < errors[form] < 2 * errors["bfloat16"] * rounding(form, size) / rounding("bfloat16", size)
    )
