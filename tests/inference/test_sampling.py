"""Choosing a token: greedy, the smallest set that reaches top_p, temperature's statistics, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.inference.sampling import Sampling, sample

DRAWS = 4000


def counts(probabilities: list[float], sampling: Sampling, seed: int = 0) -> np.ndarray:
    """How often each token comes up in DRAWS independent rows with these probabilities at temperature 1."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (DRAWS, len(probabilities))) + 5.0
    return np.bincount(sample(logits, jax.random.key(seed), sampling), minlength=len(probabilities))


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float((((found - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


def test_greedy_takes_the_largest_and_needs_no_key():
    logits = jnp.array([[0.1, 3.0, -2.0], [5.0, 4.9, 0.0], [-9.0, -8.0, -7.0]])
    for seed in range(3):
        chosen = sample(logits, jax.random.key(seed), Sampling(top_p=0.5))
        assert chosen.dtype == jnp.int32
        assert chosen.tolist() == [1, 0, 2]


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
    sampling, logits = Sampling(temperature=1.0, top_p=0.9), jnp.zeros((64, 32))
    first, again, other = (sample(logits, jax.random.key(seed), sampling).tolist() for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -0.1}, "temperature must not be negative, not -0.1"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.01}, "top_p must lie above 0"),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**settings)
