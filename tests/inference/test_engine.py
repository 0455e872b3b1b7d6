"""The engine against transformers and itself: requests that come and go, shared prompts, few pages, scores."""

import dataclasses
import functools
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from dsv2_jax.config import Compute, Mesh, Rope
from dsv2_jax.hf import load_params
from dsv2_jax.inference import programs
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.parallel import mesh as device_mesh

GOLDEN = Path(__file__).parent.parent / "golden" / "v2_tiny"
COMPUTE = Compute(dtype="float32", remat="none")
CAPACITY = Capacity(rows=4, length=256, chunk=128, page=16, pages=33)  # not enough for four long sequences
_COMPILED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def count_compilations():
    """Every program that XLA compiles, or takes from its cache on disk, is put on _COMPILED."""

    def listen(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            _COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def loaded():
    return load_params(GOLDEN)


@pytest.fixture(scope="module")
def engine(loaded):
    model, params = loaded
    engine = Engine(params, model, compute=COMPUTE, capacity=CAPACITY)
    engine.warm()
    return engine


def requests(count: int, seed: int = 0, **settings) -> list[Request]:
    """Prompts of 1 to 90 tokens and 1 to 24 new ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 90, count), rng.integers(1, 24, count)
    return [
        Request(prompt=tuple(rng.integers(0, 160, n).tolist()), max_new=int(new), seed=i, **settings)
        for i, (n, new) in enumerate(zip(*lengths, strict=True))
    ]


def arriving(engine: Engine, wanted: list[Request], seed: int = 1) -> list[list[int]]:
    """The tokens of requests that come in at random moments."""
    rng, ids, tokens = np.random.default_rng(seed), {}, [[] for _ in wanted]
    waiting = list(enumerate(wanted))
    while waiting or engine.unfinished:
        for _ in range(rng.integers(0, 3)):
            if waiting:
                place, request = waiting.pop(0)
                ids[engine.add(request)] = place
        for event in engine.step():
            tokens[ids[event.id]].append(event.token)
    return tokens


def test_32_requests_at_random_times_are_those_of_transformers_and_of_each_alone(engine):
    wanted = requests(32)
    before = len(_COMPILED)
    together = arriving(engine, wanted)
    assert len(_COMPILED) == before
    assert [list(engine.generate([request])[0].tokens) for request in wanted] == together
    judge = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    for request, new in zip(wanted, together, strict=True):
        ids = torch.tensor([request.prompt])
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = judge.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new, **settings)
        assert new == theirs[0, ids.shape[1] :].tolist()
    assert engine.replicas[0].pages.held == 0


def test_seeded_draws_do_not_depend_on_company(engine):
    hot = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
    wanted = requests(10, seed=2, sampling=hot)
    together = arriving(engine, wanted)
    assert [list(engine.generate([request])[0].tokens) for request in wanted] == together
    others = engine.generate([Request(prompt=r.prompt, max_new=r.max_new, sampling=hot, seed=99) for r in wanted])
    assert [list(r.tokens) for r in others] != together


def test_greedy_continues_as_recorded(engine, golden):
    prompts = [row[seen > 0] for row, seen in zip(golden["padded_ids"], golden["padded_mask"], strict=True)]
    found = engine.generate([Request(prompt=tuple(prompt.tolist()), max_new=32) for prompt in prompts])
    assert [list(result.tokens) for result in found] == golden["gen_padded_ids"][:, 16:].tolist()


def recorded_logprobs(golden, length: int) -> np.ndarray:
    """Float64, of every token but the first of the long recorded row."""
    z = golden["logits_long_np64"][0, : length - 1]
    z = z - z.max(-1, keepdims=True)
    own = np.take_along_axis(z, golden["ids_long"][0, 1:length, None], -1)[:, 0]
    return own - np.log(np.exp(z).sum(-1))


def test_scores_are_log_probabilities_in_float64(engine, golden):
    """Beyond the original context of 128; alone, with other requests, and with a prefix found in the cache."""
    ids, expected = golden["ids_long"][0, :200].tolist(), recorded_logprobs(golden, 200)
    whole, part, _ = engine.score([ids, ids, [5]], [1, 150, 1])
    np.testing.assert_allclose([p for p, _ in whole.scores], expected, atol=2e-4)
    np.testing.assert_allclose([p for p, _ in part.scores], expected[149:], atol=2e-4)
    again = engine.score([ids], [150])[0]
    assert again.reused == 144
    np.testing.assert_allclose([p for p, _ in again.scores], expected[149:], atol=2e-4)
    greedy = golden["logits_long_np64"][0, :199].argmax(-1) == golden["ids_long"][0, 1:200]
    assert [g for _, g in whole.scores] == greedy.tolist()


def test_log_probabilities_of_new_tokens_are_their_scores(engine):
    request = Request(prompt=(3, 1, 4, 1, 5), max_new=30, sampling=Sampling(temperature=1.5), seed=4, top=3)
    result = engine.generate([request])[0]
    scored = engine.score([(*request.prompt, *result.tokens)], [5])[0]
    np.testing.assert_allclose(result.logprobs, [p for p, _ in scored.scores], atol=1e-4)
    for (best, logprob), is_greedy in zip([t[0] for t in result.top], [g for _, g in scored.scores], strict=True):
        assert logprob <= 0
        assert is_greedy == (best in result.tokens and logprob in result.logprobs)
    assert all(len(t) == 3 and t[0][1] >= t[1][1] >= t[2][1] for t in result.top)


def test_a_group_with_one_prompt_computes_it_once(engine):
    prompt = tuple(np.random.default_rng(5).integers(0, 160, 70).tolist())
    group = [Request(prompt=prompt, max_new=4, sampling=Sampling(temperature=1.0), seed=i) for i in range(4)]
    found = engine.generate(group)
    assert sorted(result.reused for result in found) == [0, 64, 64, 64]
    alone = Request(prompt=prompt, max_new=4, sampling=Sampling(temperature=1.0), seed=2)
    assert engine.generate([alone])[0].tokens == found[2].tokens
    assert engine.replicas[0].pages.held == 0


def test_few_pages_preempt_and_change_nothing(engine):
    wanted = [Request(prompt=r.prompt, max_new=150) for r in requests(4, seed=3)]
    before = engine.replicas[0].preemptions
    together = engine.generate(wanted)
    assert engine.replicas[0].preemptions > before
    assert [engine.generate([request])[0].tokens for request in wanted] == [result.tokens for result in together]
    assert engine.replicas[0].pages.held == 0


def test_new_weights_need_no_new_programs(loaded, golden):
    model, params = loaded
    prompt = tuple(golden["gen_prompt"][0].tolist())
    wanted = [Request(prompt=prompt * 2, max_new=8)]
    scaled = jax.jit(functools.partial(jax.tree.map, lambda w: w * 1.1))(params)
    running = Engine(scaled, model, compute=COMPUTE, capacity=CAPACITY)
    other = running.generate(wanted)
    before = len(_COMPILED)
    running.replace(params)
    assert len(_COMPILED) == before
    found = running.generate(wanted)
    assert found[0].reused == 0
    assert found != other
    assert found == Engine(params, model, compute=COMPUTE, capacity=CAPACITY).generate(wanted)


def test_stop_ids_and_cancelling(engine):
    request = Request(prompt=(1, 2, 3), max_new=20)
    whole = engine.generate([request])[0]
    assert whole.reason == "length"
    at = whole.tokens.index(whole.tokens[9])
    stopped = engine.generate([Request(prompt=(1, 2, 3), max_new=20, stop_ids=(whole.tokens[9],))])[0]
    assert (stopped.tokens, stopped.reason) == (whole.tokens[: at + 1], "stop")
    ids = [engine.add(request) for _ in range(7)]
    engine.step()
    for id in ids:
        engine.cancel(id)
    assert (engine.unfinished, engine.replicas[0].pages.held, engine.step()) == (0, 0, [])


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1,), "max_new": 0}, "max-new must be positive, not 0"),
        ({"prompt": (1, 160)}, r"prompt ids must be from 0 to 159 \(the vocabulary\); found 1 to 160"),
        ({"prompt": (2, -1)}, r"prompt ids must be from 0 to 159 \(the vocabulary\); found -1 to 2"),
        ({"prompt": (1,) * 200, "max_new": 57}, "200 prompt tokens and 57 new tokens exceed the limit of 256"),
        ({"prompt": (1,), "score_from": 0}, "score_from must be from 1 to 1, the length of the prompt"),
        ({"prompt": (1,), "top": 21}, "top must be from 0 to 20, not 21"),
        ({"prompt": (1,), "sampling": Sampling(logit_bias=((160, 1.0),))}, "logit_bias has a token id outside"),
        ({"prompt": (1,), "stop": ("x",)}, "stop strings and text need a tokenizer"),
    ],
)
def test_impossible_requests_are_refused(engine, request_, told):
    with pytest.raises(ValueError, match=told):
        engine.add(Request(**request_))
    assert engine.unfinished == 0


@pytest.mark.parametrize(
    ("capacity", "told"),
    [
        ({"rows": 0}, "rows must be positive, not 0"),
        ({"chunk": 100}, "chunk must be a multiple of 64, not 100"),
        ({"length": 9999}, r"length \(9999\) exceeds the model's 5120 positions"),
        ({"length": 64, "page": 16, "pages": 4}, "4 pages cannot hold a sequence of 64 tokens"),
    ],
)
def test_impossible_capacities_are_refused(loaded, capacity, told):
    model, params = loaded
    with pytest.raises(ValueError, match=told):
        Engine(params, model, capacity=Capacity(**capacity))


def test_pages_are_such_as_the_tpus_kernel_takes(loaded):
    model, _ = loaded
    assert (Capacity().resolve(model, "xla").page, Capacity().resolve(model, "pallas").page) == (64, 256)
    with pytest.raises(ValueError, match="a multiple of 128 on a TPU, not 64"):
        Capacity(page=64).resolve(model, "pallas")


def test_page_tables_that_the_tpus_kernel_cannot_hold_are_refused(loaded):
    """512 rows of 512 pages are a MiB of page numbers, all the scalar memory that there is."""
    model = dataclasses.replace(loaded[0], max_position_embeddings=2**17, rope=Rope(factor=32.0))
    with pytest.raises(
        ValueError, match=r"512 rows of 131072 tokens in pages of 256 does not fit .*: at most 496 rows fit"
    ):
        Capacity(rows=512, chunk=512).resolve(model, "pallas")
    assert Capacity(rows=496, chunk=512).resolve(model, "pallas").pages == 496 * 512 + 1
    assert Capacity(rows=512, chunk=512, page=512).resolve(model, "pallas").rows == 512
    assert Capacity(rows=512, chunk=512).resolve(model, "xla").rows == 512


def test_meshes_that_split_layers_or_sequences_are_refused(loaded):
    model, params = loaded
    mesh = device_mesh.make(Mesh(fsdp=1, context=8))
    with pytest.raises(ValueError, match=r"mesh\.pipeline and mesh\.context must be 1"):
        Engine(params, model, mesh=mesh)


def test_weights_are_let_go_before_others_come(loaded, monkeypatch):
    """Both at once would take twice the memory; between `release` and `replace` there are none."""
    model, params = loaded
    engine = Engine(params, model, compute=COMPUTE, capacity=CAPACITY)
    old = [weakref.ref(leaf) for leaf in jax.tree.leaves(engine._prepared)]
    real, alive = programs.prepare, []

    def prepare(*arguments):
        alive.append(sum(ref() is not None for ref in old))
        return real(*arguments)

    monkeypatch.setattr(programs, "prepare", prepare)
    engine.replace(params)
    assert alive == [0]
    engine.release()
    assert engine.weight_bytes == 0
    with pytest.raises(AssertionError, match="no weights"):
        engine.generate(requests(1))
