"""Choosing a token: transformers' filters on rows of different settings, statistics of draws, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dsv2_jax.inference.sampling import Adjust, Sampling, adjusted, filtered, rows, sample

DRAWS = 4000
draw = jax.jit(sample)


def counts(probabilities: list[float], sampling: Sampling, seed: int = 0) -> np.ndarray:
    """How often each token comes up in DRAWS independent rows with these probabilities at temperature 1."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (DRAWS, len(probabilities))) + 5.0
    settings = rows([sampling] * DRAWS, [seed] * DRAWS, range(DRAWS), DRAWS)
    return np.bincount(draw(logits, settings), minlength=len(probabilities))


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float((((found - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


def test_greedy_takes_the_largest_and_needs_no_seed():
    logits = jnp.array([[0.1, 3.0, -2.0], [5.0, 4.9, 0.0], [-9.0, -8.0, -7.0]])
    for seed in range(3):
        chosen = draw(logits, rows([Sampling(top_p=0.5)] * 3, [seed] * 3, [seed] * 3, 3))
        assert chosen.dtype == jnp.int32
        assert chosen.tolist() == [1, 0, 2]


def test_filters_are_those_of_transformers():
    """Each row by its own settings, in one call; transformers takes them one by one."""
    settings = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=1),
        Sampling(temperature=1.3, top_k=40),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=2.0, min_p=0.1),
        Sampling(temperature=0.9, top_k=50, top_p=0.8),
        Sampling(temperature=1.1, top_k=30, top_p=0.95, min_p=0.02),
        Sampling(temperature=0.5, top_p=0.01),
    ]
    logits = (np.random.default_rng(0).standard_normal((len(settings), 300)) * 3).astype(np.float32)
    hot = logits / np.array([s.temperature for s in settings], np.float32)[:, None]
    mine = jax.jit(filtered)(hot, rows(settings, [0] * 8, [0] * 8, 8))
    for row, s in enumerate(settings):
        expected = torch.tensor(logits[row : row + 1]) / s.temperature
        if s.top_k:
            expected = transformers.TopKLogitsWarper(s.top_k)(None, expected)
        if s.top_p < 1:
            expected = transformers.TopPLogitsWarper(s.top_p)(None, expected)
        if s.min_p:
            expected = transformers.MinPLogitsWarper(s.min_p)(None, expected)
        np.testing.assert_array_equal(np.asarray(mine[row]), expected[0].numpy(), err_msg=str(s))


def test_penalty_is_that_of_transformers_and_bias_is_added():
    logits = np.random.default_rng(1).standard_normal((2, 50)).astype(np.float32)
    tokens = [3, 7, 7, 20]
    adjust = Adjust(np.zeros((2, 50), bool), np.zeros((2, 50), np.float32))
    adjust.seen_NW[:, tokens] = True
    adjust.bias_NW[1, [4, 7]] = 5.0, -100.0
    settings = [Sampling(repetition_penalty=1.3), Sampling(logit_bias=((4, 5.0), (7, -100.0)))]
    mine = np.asarray(adjusted(logits, rows(settings, [0, 0], [0, 0], 2), adjust))
    judge = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    np.testing.assert_allclose(mine[0], judge(torch.tensor([tokens]), torch.tensor(logits[:1]))[0], rtol=1e-6)
    expected = logits[1].copy()
    expected[[4, 7]] += 5.0, -100.0
    np.testing.assert_allclose(mine[1], expected, rtol=1e-6)


def test_a_draw_depends_on_its_own_row_alone():
    logits = np.random.default_rng(2).standard_normal((6, 100)).astype(np.float32)
    settings = [Sampling(temperature=t, top_p=0.9) for t in (0.0, 0.5, 1.0, 1.5, 1.0, 0.8)]
    seeds, times = [1, 2, 3, 4, 3, 2**40 + 5], [9, 8, 7, 6, 5, 4]
    together = draw(logits, rows(settings, seeds, times, 6))
    for i in range(6):
        padded = np.zeros((2, 100), np.float32)
        padded[0] = logits[i]
        assert draw(padded, rows(settings[i : i + 1], seeds[i : i + 1], times[i : i + 1], 2))[0] == together[i]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, [2]),
        (0.39, [2]),
        (0.41, [2, 0]),
        (0.69, [2, 0]),
        (0.71, [2, 0, 3]),
        (0.91, [2, 0, 3, 1]),
        (1.0, [2, 0, 3, 1]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    """0.4, then 0.7, 0.9, 1.0 of the mass in falling order: tokens 2, 0, 3, 1."""
    probabilities = np.array([0.3, 0.1, 0.4, 0.2])
    found = counts(probabilities.tolist(), Sampling(temperature=1.0, top_p=top_p))
    assert set(np.flatnonzero(found)) == set(kept)
    expected = np.zeros(4)
    expected[kept] = probabilities[kept] / probabilities[kept].sum() * DRAWS
    assert chi_square(found, expected) < 16.3  # of three degrees of freedom, one in a thousand is larger


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    """Probabilities to the power 1 / temperature, normalised."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    expected = probabilities ** (1 / temperature)
    expected *= DRAWS / expected.sum()
    found = counts(probabilities.tolist(), Sampling(temperature=temperature))
    assert chi_square(found, expected) < 16.3
    others = probabilities ** (1 / (temperature * 1.5))
    assert chi_square(found, others * DRAWS / others.sum()) > 16.3


def test_temperature_comes_before_top_p():
    """0.6 and 0.4 at temperature 1 are 0.69 and 0.31 at 0.5: only there does the first alone reach 0.65."""
    assert (counts([0.6, 0.4], Sampling(temperature=0.5, top_p=0.65)) > 0).tolist() == [True, False]
    assert (counts([0.6, 0.4], Sampling(temperature=1.0, top_p=0.65)) > 0).tolist() == [True, True]


def test_a_seed_fixes_the_draw():
    logits = jnp.zeros((64, 32))

    def drawn(seed: int) -> list[int]:
        return draw(logits, rows([Sampling(temperature=1.0, top_p=0.9)] * 64, [seed] * 64, range(64), 64)).tolist()

    assert drawn(5) == drawn(5) != drawn(6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0, not -0.1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be from 0 to 16777215, not -1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and positive, not 0.0"),
        ({"logit_bias": ((3, float("inf")),)}, "logit_bias must be finite"),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**settings)
