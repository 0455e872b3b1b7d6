"""RoPE and YaRN against float64, transformers' frequencies, and complex numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs import models
from dsv2_jax.config import Rope
from dsv2_jax.model import rope
from dsv2_jax.ops import rotary

YARN = Rope(factor=40.0, original_max_position_embeddings=4096)  # the released V2 (section 3.1.4)
LONG = dataclasses.replace(models.v2(), rope=YARN, max_position_embeddings=163_840)


def yarn_by_counting(settings: Rope, width: int) -> np.ndarray:
    """Pairs up to the last with beta_fast rotations over the original length keep their frequency.

    From the first with at most beta_slow rotations on it is divided by the factor, with equal steps between.
    """
    plain = [settings.theta ** (-2 * i / width) for i in range(width // 2)]
    turns = [settings.original_max_position_embeddings * f / (2 * math.pi) for f in plain]
    low = max((i for i, n in enumerate(turns) if n >= settings.beta_fast), default=0)
    high = min((i for i, n in enumerate(turns) if n <= settings.beta_slow), default=width // 2)
    slowed = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
    return np.array([f * (1 - s) + f / settings.factor * s for f, s in zip(plain, slowed, strict=True)])


def test_frequencies_by_hand():
    mine = rope.frequencies(YARN, 64)
    np.testing.assert_allclose(mine, yarn_by_counting(YARN, 64), rtol=1e-12)
    assert mine[0] == 1.0
    assert mine[31] == pytest.approx(10_000 ** (-62 / 64) / 40)
    # 4096 positions rotate pair i 4096 / (2 pi 10000^(i/32)) times: 36.6 at i = 10, 27.5 at 11; 1.13 at 22, 0.87 at 23.
    np.testing.assert_allclose(mine[:11], 10_000 ** (-np.arange(11) / 32), rtol=1e-12)
    np.testing.assert_allclose(mine[23:], 10_000 ** (-np.arange(23, 32) / 32) / 40, rtol=1e-12)
    assert mine[16] == pytest.approx(0.01 * (7 / 13) + 0.01 / 40 * (6 / 13))


def test_a_factor_of_one_is_plain_rope():
    np.testing.assert_allclose(rope.frequencies(Rope(), 64), 10_000 ** (-np.arange(32) / 32), rtol=1e-12)
    assert rope.softmax_scale(models.v2()) == pytest.approx(192**-0.5)


def test_frequencies_and_factors_of_the_released_settings_are_transformers():
    scaling = {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    }
    released = {"rope_theta": 10_000, "max_position_embeddings": 163_840, "rope_scaling": scaling}
    config = DeepseekV2Config(qk_rope_head_dim=64, **released)
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    np.testing.assert_allclose(rope.frequencies(YARN, 64), inverse.numpy(), rtol=1e-6)
    assert factor == pytest.approx(1.0)
    assert rope.softmax_scale(LONG) == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("unequal", [False, True])
def test_phases_are_exact_up_to_the_last_position(unequal):
    settings = dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5) if unequal else YARN
    model = dataclasses.replace(LONG, rope=settings)
    drawn = np.random.default_rng(0).integers(0, 163_840, 2000)
    positions = np.r_[0, 1, 255, 256, 257, 4095, 4096, 131_071, 163_583, 163_584, 163_839, drawn]
    angles = positions[:, None] * yarn_by_counting(YARN, 64)
    length = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1) if unequal else 1.0
    cos, sin = rope.phases(model, jnp.asarray(positions[None], jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    assert np.abs(np.asarray(cos[0], np.float64) - length * np.cos(angles)).max() < 1e-6
    assert np.abs(np.asarray(sin[0], np.float64) - length * np.sin(angles)).max() < 1e-6


def test_rotation_is_the_complex_one_with_first_components_first():
    rng = np.random.default_rng(1)
    x, positions = rng.standard_normal((2, 5, 3, 64)), rng.integers(0, 163_840, (2, 5))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None] * yarn_by_counting(YARN, 64))[
        :, :, None
    ]
    phases = rope.phases(LONG, jnp.asarray(positions, jnp.int32))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotary.rotate(jnp.asarray(x, jnp.float32), phases), expected, atol=1e-5)
    one_head = rotary.rotate(jnp.asarray(x[:, :, 0], jnp.float32), phases)
    np.testing.assert_allclose(one_head, expected[:, :, 0], atol=1e-5)
    assert rotary.rotate(jnp.asarray(x, jnp.bfloat16), phases).dtype == jnp.bfloat16


def test_inner_products_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal(64), jnp.float32) for _ in range(2))
    starts = jnp.array([[0, 1, 300, 4096, 131_000]], jnp.int32)

    def turned(x, positions):
        return np.asarray(rotary.rotate(jnp.broadcast_to(x, (1, 5, 64)), rope.phases(LONG, positions)), np.float64)[0]

    for distance in (0, 7, 5000):
        products = (turned(q, starts + distance) * turned(k, starts)).sum(-1)
        z = (np.asarray(q)[0::2] + 1j * np.asarray(q)[1::2]) * np.conj(np.asarray(k)[0::2] + 1j * np.asarray(k)[1::2])
        expected = (z * np.exp(1j * distance * yarn_by_counting(YARN, 64))).sum().real
        np.testing.assert_allclose(products, expected, atol=5e-5)


def test_rope_with_heads_last_equals_the_plain_form(monkeypatch):
    """What TPUs compute, parted columns and heads last, against the plain form."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTX, w_XHR = jax.random.normal(keys[0], (2, 5, 6)), jax.random.normal(keys[1], (6, 3, 8))
    angles = jax.random.normal(keys[2], (2, 5, 4))
    arguments = x_BTX, w_XHR, (jnp.cos(angles), jnp.sin(angles))
    plain = rotary.project_and_rotate(*arguments)
    monkeypatch.setattr(rotary, "on_cpu", lambda: False)
    np.testing.assert_allclose(rotary.project_and_rotate(*arguments), plain, atol=1e-5)
