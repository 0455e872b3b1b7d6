"""Generation on a golden model: transformers' own tokens, padded rows included; seeds; what is refused."""

from pathlib import Path

import numpy as np
import pytest

from dsv2_jax.config import Compute
from dsv2_jax.hf import load_params
from dsv2_jax.inference import generation
from dsv2_jax.inference.sampling import Sampling

GOLDEN = Path(__file__).parent.parent / "golden" / "v2_tiny"
COMPUTE = Compute(dtype="float32", remat="none")


@pytest.fixture(scope="module")
def golden():
    """The model, its parameters as generation reads them, and the recorded answers."""
    model, params = load_params(GOLDEN)
    return model, generation.prepare(params, COMPUTE), np.load(GOLDEN / "golden.npz")


def generate(golden, prompts, max_new, seed=0, **sampling) -> np.ndarray:
    model, prepared, _ = golden
    settings = Sampling(**sampling)
    steps = generation.generate(prepared, prompts, max_new, model=model, compute=COMPUTE, sampling=settings, seed=seed)
    return np.stack(list(steps), axis=1)


def padded_prompts(golden) -> list[list[int]]:
    ids, mask = golden[2]["padded_ids"], golden[2]["padded_mask"]
    return [row[seen > 0].tolist() for row, seen in zip(ids, mask, strict=True)]


def test_prompts_of_different_lengths_go_on_as_recorded(golden):
    prompts = padded_prompts(golden)
    assert len({len(prompt) for prompt in prompts}) == 2
    new = generate(golden, prompts, 32)
    np.testing.assert_array_equal(new, golden[2]["gen_padded_ids"][:, 16:])


def test_a_seed_fixes_the_tokens(golden):
    prompts = padded_prompts(golden)
    first, again, other = (generate(golden, prompts, 8, seed, temperature=1.0, top_p=0.95) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.int32
    assert ((first >= 0) & (first < 160)).all()


def test_it_is_lazy_and_may_be_stopped(golden):
    model, prepared, _ = golden
    steps = generation.generate(
        prepared, padded_prompts(golden), 1000, model=model, compute=COMPUTE, sampling=Sampling()
    )
    assert next(steps).tolist() == golden[2]["gen_padded_ids"][:, 16].tolist()


@pytest.mark.parametrize(
    ("prompts", "max_new", "told"),
    [
        ([], 1, "a prompt holds no token"),
        ([[1], []], 1, "a prompt holds no token"),
        ([[1]], 0, "max-new must be positive, not 0"),
        ([[1, 160]], 1, "prompt ids must lie in 0 to 159, the model's vocabulary; found 1 to 160"),
        ([[1], [2, -1]], 1, "prompt ids must lie in 0 to 159, the model's vocabulary; found -1 to 2"),
        ([[1] * 120], 5001, "120 prompt tokens and 5001 new ones exceed the model's 5120 positions"),
    ],
)
def test_impossible_requests_are_refused(golden, prompts, max_new, told):
    with pytest.raises(ValueError, match=told):
        generate(golden, prompts, max_new)
