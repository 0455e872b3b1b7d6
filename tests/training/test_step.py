"""One step by hand, gradient accumulation against the full batch, and updates that must be skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch, random_params, train

from configs import PRESETS
from dsv2_jax.config import SINGLE, Batch, Optimizer
from dsv2_jax.training.step import create, exempt_sequences, train_step


def linear_loss(params, batch, *, config, exempt_B, total_weight, share):  # noqa: ARG001
    """Mean over tokens of w . target, whose gradient is the mean target."""
    value = (params["layer"]["w_D"].sum() * batch["targets_BT"] * batch["weights_BT"]).sum() / total_weight
    return value, {"nll": value, "share": jnp.float32(share), "exempt": exempt_B.sum() * 1.0}


def batch_of(config, micro_batches, rows):
    """Random tokens; about half have no weight."""
    made = batch(config.model, micro_batches * rows, config.batch.length, micro_batches)
    weights_BT = np.random.default_rng(1).integers(0, 2, made["weights_BT"].shape)
    return made | {"weights_BT": weights_BT.astype(np.float32)}


def test_one_step_by_hand():
    config = dataclasses.replace(
        PRESETS["tiny"](), optimizer=Optimizer(weight_decay=0.1, clip_norm=1.0, epsilon=1e-8, warmup_steps=0)
    )
    batch = {
        "tokens_BT": np.zeros((2, 1, 2), np.int32),
        "targets_BT": np.array([[[1, 2]], [[6, 100]]], np.int32),
        "weights_BT": np.array([[[1, 1]], [[1, 0]]], np.float32),
    }
    params = {"layer": {"w_D": jnp.array([0.5, -1.0])}}
    state, metrics = train_step(create(params, config), batch, 0.01, config=config, loss=linear_loss)
    # The mean target is (1 + 2 + 6) / 3 = 3 for both parameters; Adam's first step is the sign of the gradient.
    assert float(metrics["loss"]) == pytest.approx(3 * (0.5 - 1.0))
    assert float(metrics["grad_norm"]) == pytest.approx(3 * 2**0.5)
    assert (float(metrics["share"]), float(metrics["skipped"]), int(state.step)) == (1.0, 0.0, 1)
    expected = [0.5 - 0.01 * (1 + 0.1 * 0.5), -1.0 - 0.01 * (1 - 0.1 * 1.0)]
    np.testing.assert_allclose(state.params["layer"]["w_D"], expected, rtol=1e-6)
    adam = state.optimizer[0]
    np.testing.assert_allclose(adam.mu["layer"]["w_D"], 0.1 * np.sqrt(0.5), rtol=1e-6)  # of the clipped gradient
    np.testing.assert_allclose(adam.nu["layer"]["w_D"], 0.05 * 0.5, rtol=1e-5)


def test_four_micro_batches_are_one_batch():
    preset = PRESETS["tiny"]()
    moe = dataclasses.replace(preset.model.moe, capacity_factor=0.0)  # a budget is per micro-batch, not per step
    model = dataclasses.replace(preset.model, moe=moe, num_hidden_layers=2)
    optimizer = dataclasses.replace(
        preset.optimizer, epsilon=1e-3
    )  # otherwise rounding of tiny gradients flips their sign
    config = dataclasses.replace(preset, model=model, optimizer=optimizer, mesh=SINGLE)
    whole = batch_of(config, 1, 8)
    split = {name: value.reshape(4, 2, -1) for name, value in whole.items()}
    ((one_metrics,), one, _), ((four_metrics,), four, _) = (
        train(config, random_params(model), rows, lr=0.01) for rows in (whole, split)
    )
    for name, value in one_metrics.items():
        np.testing.assert_allclose(four_metrics[name], value, rtol=2e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(four_metrics["loss"], one_metrics["loss"], rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison):
    def poisoned(params, batch, **rest):
        value, metrics = linear_loss(params, batch, **rest)
        if poison == "loss":
            return value + jnp.inf, metrics
        zero = params["layer"]["w_D"][0] * 0.0
        return value + jnp.where(zero == 0, jnp.sqrt(zero), 0), metrics  # finite, with an infinite slope

    config = PRESETS["tiny"]()
    batch = batch_of(config, 2, 3)
    state = create({"layer": {"w_D": jnp.array([0.5, -1.0])}}, config)
    state, _ = train_step(state, batch, 0.01, config=config, loss=linear_loss)
    before = jax.tree.map(np.array, state)
    state, metrics = train_step(state, batch, 0.01, config=config, loss=poisoned)
    assert float(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"] + metrics["grad_norm"])
    assert np.isfinite(metrics["loss"]) == (poison == "gradient")
    jax.tree.map(np.testing.assert_array_equal, before[:2], tuple(state[:2]))
    assert int(state.step) == 2
    state, metrics = train_step(state, batch, 0.01, config=config, loss=linear_loss)
    assert float(metrics["skipped"]) == 0
    assert (np.asarray(state.params["layer"]["w_D"]) != before.params["layer"]["w_D"]).all()


@pytest.mark.parametrize("cause", ["epsilon", "learning rate", "moments"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_count(cause):
    """Loss and gradients are finite: a gradient of zero over an epsilon of zero, an infinite rate, a spoilt moment."""
    preset = PRESETS["tiny"]()
    epsilon = 0.0 if cause == "epsilon" else 1e-8
    config = dataclasses.replace(preset, optimizer=dataclasses.replace(preset.optimizer, epsilon=epsilon))
    batch = batch_of(config, 2, 3) | ({"targets_BT": np.zeros((2, 3, 32), np.int32)} if cause == "epsilon" else {})
    state = create({"layer": {"w_D": jnp.array([0.5, -1.0])}}, config)
    if cause == "moments":
        state = state._replace(optimizer=jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.ndim else x, state.optimizer))
    before = jax.tree.map(np.array, state)
    rate = np.inf if cause == "learning rate" else 0.01
    state, metrics = train_step(state, batch, rate, config=config, loss=linear_loss)
    assert np.isfinite(metrics["loss"] + metrics["grad_norm"]) and float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before[:2], tuple(state[:2]))
    assert int(state.step) == 1


def test_exempt_sequences_of_a_budget_are_a_tenth_of_them_rounded_by_chance():
    preset = PRESETS["tiny"]()
    for together, numbers in ((25, {2, 3}), (10, {1}), (5, {0, 1}), (0, {50})):
        moe = dataclasses.replace(preset.model.moe, budget_sequences=together)
        model, batch = dataclasses.replace(preset.model, moe=moe), Batch(size=500, length=4)
        config = dataclasses.replace(preset, model=model, batch=batch)
        drawn = np.asarray(exempt_sequences(config, jnp.int32(7), (8, 500)))
        per_budget = drawn.reshape(8, -1, together or 500).sum(axis=-1)
        assert set(per_budget.ravel().tolist()) == numbers
        assert drawn.mean() == pytest.approx(0.1, abs=0.015)


def test_exempt_sequences_are_a_tenth_and_new_every_step():
    config = PRESETS["tiny"]()
    draws = [np.asarray(exempt_sequences(config, jnp.int32(step), (20, 500))) for step in (0, 1, 0)]
    assert all(draw.dtype == bool and 0.085 < draw.mean() < 0.115 for draw in draws)  # 10,000 draws: sigma 0.003
    assert (draws[0] == draws[2]).all() and (draws[0] != draws[1]).any()
    other = dataclasses.replace(config, seed=1)
    assert (np.asarray(exempt_sequences(other, jnp.int32(0), (20, 500))) != draws[0]).any()
