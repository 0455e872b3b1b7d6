"""AdamW against PyTorch's, and the schedules against values worked out by hand."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from configs import PRESETS
from dsv2_jax.config import Batch, Optimizer
from dsv2_jax.training import optimizer


def test_several_steps_are_pytorchs():
    config = Optimizer(peak_lr=1e-2, weight_decay=0.3, clip_norm=1.5)
    rng = np.random.default_rng(0)
    start = {"w_q_DHR": rng.normal(size=(4, 3, 2)), "norm_D": rng.normal(size=4), "w_embed_WD": rng.normal(size=(5, 4))}
    params = {"dense": {name: value.astype(np.float32) for name, value in start.items()}}
    theirs = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    judge = torch.optim.AdamW(
        [
            {"params": [theirs["w_q_DHR"], theirs["w_embed_WD"]], "weight_decay": 0.3},
            {"params": [theirs["norm_D"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    ours = optimizer.adamw(config)
    state = ours.init(params)
    for step in range(6):
        lr = 1e-2 * (step + 1)
        size = 10.0 if step % 2 else 0.01  # clipped, and not
        gradients = {name: (size * rng.normal(size=value.shape)).astype(np.float32) for name, value in start.items()}
        norm = optax.global_norm(gradients)
        updates, state = ours.update({"dense": optimizer.clip(gradients, norm, config)}, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u, lr=lr: -lr * u, updates))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip_norm)
        for group in judge.param_groups:
            group["lr"] = lr
        judge.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(params["dense"][name], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_only_matrices_are_decayed():
    from dsv2_jax import parameters

    tree = jax.tree.map(lambda _: 0, parameters.tree(PRESETS["tiny"]().model), is_leaf=lambda x: isinstance(x, tuple))
    decayed = optimizer.is_decayed(tree)
    names = {name: value for part in decayed.values() for name, value in part.items()}
    assert {name for name, value in names.items() if not value} == {
        "norm_D", "norm_attention_D", "norm_ffn_D", "norm_q_Q", "norm_kv_C",
    }  # fmt: skip
    assert names["w_embed_WD"] and names["w_router_DE"]


@pytest.mark.parametrize(
    ("step", "tokens", "rate"),
    [
        (0, 0, 2.4e-4 / 2000),
        (999, 10**9, 1.2e-4),
        (1999, 10**10, 2.4e-4),
        (5000, 4_859_999_999_999, 2.4e-4),
        (5000, 4_860_000_000_000, 2.4e-4 * 0.316),
        (9000, 7_289_999_999_999, 2.4e-4 * 0.316),
        (9000, 7_290_000_000_000, 2.4e-4 * 0.316**2),
    ],
)
def test_learning_rate_of_v2(step, tokens, rate):
    assert optimizer.learning_rate(PRESETS["v2"](), step, tokens) == pytest.approx(rate, rel=1e-12)


def test_no_warmup_starts_at_the_peak():
    config = dataclasses.replace(PRESETS["v2"](), optimizer=Optimizer(warmup_steps=0))
    assert optimizer.learning_rate(config, 0, 0) == 2.4e-4


def test_batch_ramp_of_v2():
    ramp = [(0, 2304), (74_999_999_999, 2304), (75 * 10**9, 4608), (150 * 10**9, 6912), (224_999_999_999, 6912)]
    for tokens, size in [*ramp, (225 * 10**9, 9216), (8 * 10**12, 9216)]:
        assert optimizer.batch_size(PRESETS["v2"](), tokens) == size


def test_a_fine_ramp_stays_under_its_line_in_few_sizes():
    batch = Batch(size=400, length=8, micro_size=4, ramp_from=100, ramp_tokens=1000)
    config = dataclasses.replace(PRESETS["tiny"](), tokens=10**6, batch=batch)
    sizes = [optimizer.batch_size(config, tokens) for tokens in range(1001)]
    assert sizes == sorted(sizes) and sizes[0] == 100 and sizes[-1] == 400
    assert len(set(sizes)) == 9 and all(size % 4 == 0 for size in sizes)
    assert all(line - 42 < size <= line for size, line in zip(sizes, np.linspace(100, 400, 1001), strict=True))


def test_without_a_ramp_the_batch_is_constant():
    assert {optimizer.batch_size(PRESETS["v2_lite"](), tokens) for tokens in (0, 10**6, 10**12)} == {4608}
