"""Routing replay: the engine returns the experts that the network chose, and an update can use them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import rows_of

from configs import pretrain
from dsv2_jax.alignment import grpo, policy
from dsv2_jax.alignment.samples import Sample, arrays
from dsv2_jax.config import SINGLE, Batch, Compute, Grpo
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.model import transformer

LENGTH, GROUP = 72, 4


def config_of(dtype, replay):
    return dataclasses.replace(
        pretrain.tiny(),
        batch=Batch(size=4 * GROUP, length=LENGTH),
        compute=Compute(dtype=dtype, remat="none", loss_chunk=256),
        mesh=SINGLE,
        grpo=Grpo(group=GROUP, prompts=4, max_new=12, replay=replay, rewards=("brevity",), beta=0.1),
    )


@pytest.fixture(scope="module")
def params():
    """Drawn wide, so that experts differ and logits are far from alike."""
    drawn = jax.jit(functools.partial(transformer.init, pretrain.tiny().model))(jax.random.key(5))
    return jax.tree.map(lambda w: w * 3 if w.ndim > 1 else w, drawn)


def draw(params, dtype):
    """Samples of 4 prompts of 17 to 56 tokens, pages shared and given up on the way."""
    config, rng = config_of(dtype, False), np.random.default_rng(0)
    capacity = Capacity(rows=8, length=LENGTH + 1, chunk=64, page=16, pages=14)
    engine = Engine(params, config.model, compute=config.compute, capacity=capacity, routes=True)
    asked = [tuple(rng.integers(0, 384, n).tolist()) for n in (17, 30, 56, 40)]
    prompts = [ids for ids in asked for _ in range(GROUP)]
    wanted = [
        Request(prompt=ids, max_new=12, seed=i, sampling=Sampling(temperature=1.0)) for i, ids in enumerate(prompts)
    ]
    results = engine.generate(wanted)
    assert sum(r.reused for r in results) > 0
    assert sum(replica.preemptions for replica in engine.replicas) > 0
    return [
        Sample(
            item={}, prompt=ids, answer=r.tokens, logprobs=r.logprobs, text="", rewards={"brevity": float(i % 3)},
            experts=r.experts,
        )
        for i, (ids, r) in enumerate(zip(prompts, results, strict=True))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def samples(params):
    """Drawn in float32."""
    return draw(params, "float32")


def scored(params, samples, dtype, replay):
    """The rows of an update, and its figures of disagreement."""
    config = config_of(dtype, replay)
    rows, _ = arrays(samples, config)
    one = {name: leaf[None] for name, leaf in rows.items()}
    logp_ABT, experts = policy.log_probabilities(params, one, config=config, mesh=None)
    rows["old_BT"] = np.asarray(logp_ABT[0])
    rows["reference_BT"] = rows["old_BT"] - 0.1
    return rows, grpo.disagreement(rows, samples, np.asarray(experts)[0], 2.0)


def test_the_samplers_experts_are_those_of_a_full_forward_pass(params, samples):
    config = config_of("float32", False)

    @jax.jit
    def chosen(ids_BT):
        out = transformer.forward(params, rows_of(ids_BT), model=config.model, compute=config.compute)
        return out.statistics["experts_BTK"]

    for sample in samples:
        ids = (*sample.prompt, *sample.answer)[:-1]
        padded_BT = np.array([(*ids, *[0] * (LENGTH - len(ids)))])  # padding after the sequence, which it does not see
        found_TLK = np.moveaxis(np.asarray(chosen(padded_BT))[:, 0, : len(ids)], 0, 1)
        np.testing.assert_array_equal(np.sort(found_TLK, -1), np.sort(sample.experts, -1))
    _, figures = scored(params, samples, "float32", False)
    assert figures["router_disagreement"] == 0 and figures["sampler_gap_max"] < 1e-4
    assert figures["importance"] == pytest.approx(1, abs=1e-4) and figures["truncated"] == 0


def test_replay_ends_the_disagreement_of_routers_and_narrows_the_gap(params):
    samples = draw(params, "bfloat16")
    _, without = scored(params, samples, "bfloat16", False)
    rows, replayed = scored(params, samples, "bfloat16", True)
    assert without["router_disagreement"] > 0.005
    assert replayed["router_disagreement"] == 0
    assert replayed["sampler_gap"] < 0.8 * without["sampler_gap"]
    assert rows["experts_BTLK"].shape == (16, LENGTH, 2, 4)


def test_replay_of_the_routers_own_choices_changes_no_gradient(params, samples):
    found = []
    for replay in (False, True):
        rows, _ = scored(params, samples, "float32", replay)
        call = jax.jit(jax.value_and_grad(policy.loss, has_aux=True), static_argnames="config")
        common = {"config": config_of("float32", replay), "exempt_B": None, "total_weight": 16.0, "share": 1.0}
        found.append(call(params, rows, **common))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (np.abs(a).max() + 1e-3))
