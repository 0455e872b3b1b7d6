"""Positions up to 163,840: phases against float64, visibility, and a sequence over devices against one device."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch, eight_heads, train

from configs import PRESETS, models
from dsv2_jax.config import SINGLE, Batch, Compute, Config, Mesh, Model, Optimizer
from dsv2_jax.model import rope, transformer
from dsv2_jax.ops.cpu import attention as cpu

LONGEST = 163_840


def yarn(width: int, positions: np.ndarray) -> np.ndarray:
    """The paper's angles in float64, written down independently: s = 40, alpha = 1, beta = 32, original 4096."""
    angles = []
    for pair in range(width // 2):
        theta = 10_000.0 ** (-2 * pair / width)

        def boundary(turns: float) -> float:
            return width / 2 * np.log(4096 / (2 * np.pi * turns)) / np.log(10_000.0)

        low, high = np.floor(boundary(32)), np.ceil(boundary(1))
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        angles.append(theta * (1 - ramp) + theta / 40 * ramp)
    return positions[:, None].astype(np.float64) * np.array(angles)


@pytest.mark.parametrize("preset", ["v2_long", "v2_lite_long"])
def test_phases_are_exact_at_every_position(preset):
    model = PRESETS[preset]().model
    assert (model.rope.factor, model.rope.original_max_position_embeddings) == (40, 4096)
    positions = np.arange(model.max_position_embeddings)
    wanted = yarn(64, positions)
    cos, sin = jax.jit(lambda p: rope.phases(model, p))(jnp.asarray(positions[None], jnp.int32))
    np.testing.assert_allclose(np.asarray(cos[0]), np.cos(wanted), atol=3e-7, rtol=0)
    np.testing.assert_allclose(np.asarray(sin[0]), np.sin(wanted), atol=3e-7, rtol=0)


def test_interpolation_divides_every_position():
    plain = models.nano().rope
    stretched = dataclasses.replace(plain, kind="linear", factor=16.0)
    np.testing.assert_allclose(rope.frequencies(stretched, 32), rope.frequencies(plain, 32) / 16, rtol=1e-15)


def test_the_longest_context_is_the_papers():
    assert PRESETS["v2_long"]().model.max_position_embeddings == LONGEST == 40 * 4096
    config = PRESETS["v2_long"]()
    assert (config.batch.size, config.batch.length, config.tokens) == (576, 32_768, 1000 * 576 * 32_768)


def test_only_the_rope_settings_differ_from_what_is_extended():
    for short, long in (("nano", "nano_long"), ("v2", "v2_long"), ("v2_lite", "v2_lite_long")):
        a, b = PRESETS[short]().model, PRESETS[long]().model
        same = {"rope": a.rope, "max_position_embeddings": a.max_position_embeddings}
        assert dataclasses.replace(b, **same) == a


@pytest.mark.parametrize("begin", [0, 100_003])  # of the document that the queries belong to
def test_the_last_queries_see_just_their_document(begin):
    """Eight queries at positions up to the 163,840th against float64. Keys they may not see would score highest."""
    last, rng = 8, np.random.default_rng(1)
    offset = LONGEST - 2 * last
    q = rng.standard_normal((1, last, 1, 4), np.float32)
    k = rng.standard_normal((1, LONGEST, 1, 4), np.float32)
    v = rng.standard_normal((1, LONGEST, 1, 3), np.float32)
    k[:, :begin] = k[:, offset + last :] = 9 * q[:, -1:]
    segments = np.where(np.arange(LONGEST) < begin, 1, 2).astype(np.int32)[None]
    here = segments[:, offset : offset + last]
    found = cpu.attention(q, k, v, scale=0.5, segments_BT=here, segments_BS=segments, offset=offset)
    for i in range(last):
        scores = 0.5 * k[0, begin : offset + i + 1, 0].astype(np.float64) @ q[0, i, 0].astype(np.float64)
        weights = np.exp(scores - scores.max())
        wanted = weights @ v[0, begin : offset + i + 1, 0].astype(np.float64) / weights.sum()
        np.testing.assert_allclose(np.asarray(found[0, i, 0]), wanted, atol=2e-6, rtol=0)


def long_model() -> Model:
    """Tiny with YaRN to 8K, one MoE layer, and heads that eight devices divide."""
    tiny = models.tiny()
    return dataclasses.replace(
        tiny,
        num_hidden_layers=2,
        max_position_embeddings=8_192,
        attention=eight_heads(),
        rope=dataclasses.replace(tiny.rope, factor=64.0),
        moe=dataclasses.replace(tiny.moe, capacity_factor=0.0),
    )


def one_step(mesh: Mesh) -> tuple[dict, dict]:
    """Metrics and gradients (AdamW's first moments) of a row of 8K: a document of 6,000 tokens and another one."""
    length, model = 8_192, long_model()
    config = Config(
        workdir=Path(),
        tokens=length,
        model=model,
        batch=Batch(size=1, length=length),
        optimizer=Optimizer(epsilon=1e-4),
        compute=Compute(dtype="float32", remat="full", loss_chunk=1024),
        mesh=mesh,
    )
    params = jax.device_get(jax.jit(lambda: transformer.init(model, jax.random.key(1)))())
    (metrics,), _, moments = train(config, params, batch(model, 1, length, second=6_000))
    return metrics, moments


@pytest.mark.slow
def test_8k_over_eight_devices_are_8k_on_one():
    metrics, gradients = one_step(Mesh(fsdp=1, context=8))
    wanted_metrics, wanted = one_step(SINGLE)
    for name in ("nll", "loss"):
        if name in wanted_metrics:
            np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=2e-6)
    assert {"nll", "loss"} & wanted_metrics.keys()
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
