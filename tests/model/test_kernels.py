"""The model on the Pallas kernels, run step by step on CPU, is the model on XLA: loss and gradients, on a mesh too."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from tiny import GQA, batch, train

from configs import models
from dsv2_jax import parameters
from dsv2_jax.config import SINGLE, Attention, Batch, Compute, Config, Mesh, Model, Optimizer
from dsv2_jax.inference import quantize
from dsv2_jax.model import transformer
from dsv2_jax.model.moe import RoutedTokens, mixture
from dsv2_jax.ops import attention
from dsv2_jax.ops.switch import Execution
from pallas_kernels import chips
from pallas_kernels.expert_dispatch import row_pipeline, weight_gradient
from pallas_kernels.expert_dispatch.tiles import Tiles
from pallas_kernels.latent_attention import flash

ROWS, LENGTH = 4, 32


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run on CPU, as plain JAX: the interpreter that finds races has effects, which remat does not take."""

    monkeypatch.setattr(attention, "latent_attention", functools.partial(flash.attention, interpret=True))
    monkeypatch.setattr(chips, "here", lambda: "v5p")  # which alone lets the kernels be chosen
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    # Small tiles: what XLA has to compile here grows with them.
    small = Tiles(rows=64, step=64, chunk=128)
    monkeypatch.setattr(row_pipeline, "fit", lambda *_, **__: small)
    monkeypatch.setattr(weight_gradient, "fit", lambda *_: small)


def model(kind: Attention | None = None) -> Model:
    """Two layers, one of them with experts; widths that are no multiples of what a TPU's registers hold."""
    tiny = dataclasses.replace(models.tiny(), num_hidden_layers=2)
    moe = dataclasses.replace(tiny.moe, n_routed_experts=8, n_group=4, topk_group=2, budget_sequences=2)
    return dataclasses.replace(tiny, moe=moe, attention=kind or tiny.attention)


def gradients(size: Model, mesh: Mesh, kernels: str, remat: str) -> tuple[dict, dict]:
    """Metrics and Adam's first moments after one step: the clipped gradients, scaled."""
    config = Config(
        workdir=Path(),
        tokens=ROWS * LENGTH,
        model=size,
        batch=Batch(size=ROWS, length=LENGTH),
        optimizer=Optimizer(clip_norm=1e3),
        compute=Compute(dtype="float32", remat=remat, kernels=kernels, loss_chunk=64),
        mesh=mesh,
    )
    params = jax.jit(functools.partial(transformer.init, size))(jax.random.key(1))
    (metrics,), _, moments = train(config, params, batch(size, ROWS, LENGTH, second=11, padding=25), lr=0.0)
    return metrics, moments


CASES = {
    "mla": (None, SINGLE, "attention"),
    "gqa": (GQA, SINGLE, "full"),
    "mesh": (None, Mesh(fsdp=2, expert=2, context=2), "attention"),
}


@pytest.mark.parametrize("name", ["mla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gqa", "mesh"))])
def test_a_step_with_kernels_is_the_step_without(name):
    kind, mesh, remat = CASES[name]
    run = functools.partial(gradients, model(kind), mesh, remat=remat)
    ours, theirs = run(kernels="pallas"), run(kernels="xla")
    assert ours[0]["dropped"] == theirs[0]["dropped"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), ours, theirs)


def test_experts_in_8_bits_with_kernels_are_those_without():
    """In float32, so that the two ways to use a scale round alike."""
    size, rng = model(), np.random.default_rng(0)
    names = parameters.tree(size)["moe"]
    p = {name: jnp.asarray(rng.standard_normal(shape[1:]), jnp.float32) for name, shape in names.items()}
    p = {name: quantize.leaf(name, w, "int8") for name, w in p.items()}
    x_BTD = jnp.asarray(rng.standard_normal((ROWS, 8, size.hidden_size)), jnp.float32)
    valid_BT = jnp.arange(8) < jnp.array([[8], [5], [0], [8]])
    ours, theirs = (
        jax.jit(
            lambda p, x, how=how: mixture(p, x, RoutedTokens(valid_BT), size.moe, Execution(implementation=how))[0]
        )(p, x_BTD)
        for how in ("pallas", "cpu")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
