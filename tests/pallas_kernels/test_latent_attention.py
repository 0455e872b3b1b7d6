"""Latent attention: every implementation against float64, with gradients; the kernels compile for TPUs."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import Number

from pallas_kernels.latent_attention import flash, latent_attention, reference


def as_on_v5p(*args, **kwargs) -> jax.Array:
    """With the blocks of v5p: smaller masked parts, the sum of weights on the VPU, gradients for two cores."""
    (_, k_rope), v, t = args[1], args[2], args[0][0].shape[2]
    how = flash.tuning(t, v.shape[2], v.shape[1], k_rope is not None, v.dtype, "v5p")
    return flash.attention(*args, **kwargs, how=how, interpret=True)


IMPLEMENTATIONS = {"pallas": functools.partial(flash.attention, interpret=True), "xla": reference.latent_attention}


def grouped(attention: Callable) -> Callable:
    """`attention` with its arrays as separate arguments, as `jax.vjp` needs them."""

    def call(q_nope, q_rope, k_nope, k_rope, v, *, segments_BT, segments_BS, **rest):
        return attention((q_nope, q_rope), (k_nope, k_rope), v, (segments_BT, segments_BS), **rest)

    return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """H heads and J KV heads, T queries from slot `offset` on, S keys."""

    b: int = 1
    h: int = 4
    j: int = 4
    t: int
    s: int
    n: int = 16
    r: int = 8
    v: int = 16
    offset: int = 0
    documents: tuple[int, ...] = ()  # first slots of the second and later documents
    padding: tuple[int, int] = (0, 0)  # slots at the start and end of the row
    size: float = 1.0  # standard deviation of queries and keys
    dtype: str = "float32"


CASES = {
    "mla": Case(b=2, t=256, s=256, n=16, r=8, v=16),
    "mla_bf16": Case(t=256, s=256, n=16, r=8, v=16, dtype="bfloat16"),
    "mha": Case(h=2, j=2, t=256, s=256, n=32, r=0, v=16),
    "gqa": Case(h=4, j=2, t=160, s=160, n=16, r=0),
    "mqa_bf16": Case(h=4, j=1, t=130, s=130, n=16, r=0, dtype="bfloat16"),
    "grouped_mla": Case(h=4, j=2, t=100, s=100),
    "one_token": Case(t=1, s=1),
    "one_query": Case(t=1, s=300, offset=299),
    "odd_lengths": Case(b=2, t=77, s=203, offset=126),
    "several_blocks": Case(h=2, j=2, t=1500, s=1500),
    "packed": Case(b=2, t=600, s=600, documents=(130, 131, 300, 520), padding=(0, 60)),
    "packed_bf16": Case(t=300, s=300, documents=(100, 200), padding=(0, 30), dtype="bfloat16"),
    "left_padded": Case(t=200, s=200, padding=(70, 0)),
    "chunk_of_prefill": Case(t=128, s=640, offset=200),
    "chunk_of_a_packed_row": Case(t=200, s=640, offset=301, documents=(150, 400), padding=(0, 140)),
    "keys_of_another_device": Case(t=256, s=256, offset=512, documents=(100,)),
    "several_chunks": Case(h=2, j=2, t=300, s=4100, offset=3700),
    "several_chunks_packed": Case(h=2, j=1, t=300, s=4100, offset=3000, documents=(1100, 3150)),
}
LARGE_SCORES = {  # so large that the kernel needs its running maximum
    "large": Case(h=2, j=2, t=256, s=256, size=20.0),
    "large_several_chunks": Case(h=1, j=1, t=256, s=4100, offset=3844, size=20.0),
}
TPUS = {  # topology, kind, cores of a device
    "v5e": ("v5e:2x2", "TPU v5 lite", 1),
    "v5p": ("v5p:2x2x1", "TPU v5", 2),
    "v6e": ("v6e:2x2", "TPU v6 lite", 1),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x", 1),
}


def inputs(case: Case) -> tuple[dict, dict]:
    """The arrays in the case's dtype, and the keyword arguments."""
    random = np.random.default_rng(0)

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * size, case.dtype)

    c = case
    segments_BS = np.tile(np.searchsorted(c.documents, np.arange(c.s), side="right") + 1, (c.b, 1)).astype(np.int32)
    segments_BS[:, : c.padding[0]] = 0
    segments_BS[:, c.s - c.padding[1] :] = 0
    slots = np.minimum(c.offset + np.arange(c.t), c.s - 1)
    arrays = {
        "q_nope": normal(c.b, c.h, c.t, c.n, size=c.size),
        "q_rope": normal(c.b, c.h, c.t, c.r, size=c.size) if c.r else None,
        "k_nope": normal(c.b, c.j, c.s, c.n, size=c.size),
        "k_rope": normal(c.b, c.s, c.r, size=c.size) if c.r else None,
        "v": normal(c.b, c.j, c.s, c.v),
        "g": normal(c.b, c.h, c.t, c.v),
    }
    rest = {
        "scale": (c.n + c.r) ** -0.5,
        "segments_BT": segments_BS[:, slots],
        "segments_BS": segments_BS,
        "offset": c.offset,
    }
    return arrays, rest


def truth(arrays: dict, rest: dict) -> tuple[Number | None, ...]:
    """Result and gradients with their bounds. Queries that see nothing have a cotangent of 0."""
    x = {k: None if a is None else np.asarray(a, np.float64) for k, a in arrays.items()}
    (b, h, t, n), j, dtype = x["q_nope"].shape, x["v"].shape[1], arrays["v"].dtype
    segments_BT, segments_BS = rest["segments_BT"], rest["segments_BS"]
    heads = np.arange(h) // (h // j)
    k, v = x["k_nope"][:, heads], x["v"][:, heads]
    q = x["q_nope"]
    if x["q_rope"] is not None:
        q = np.concatenate([q, x["q_rope"]], axis=-1)
        k = np.concatenate([k, np.repeat(x["k_rope"][:, None], h, axis=1)], axis=-1)
    sees = (np.arange(k.shape[2]) <= np.arange(t)[:, None] + rest["offset"]) & (segments_BT[..., None] > 0)
    sees = (sees & (segments_BT[..., None] == segments_BS[:, None]))[:, None]
    g = x["g"] * sees.any(-1, keepdims=True)
    o, dq, dk, dv = bounds.attention(*map(bounds.exact, (q, k, v, g)), sees, rest["scale"], dtype)
    dk_nope, dv = (x.each(lambda a: a.reshape(b, j, h // j, *a.shape[2:])).sum(2).to(dtype) for x in (dk[..., :n], dv))
    if x["q_rope"] is None:
        return o, dq, None, dk_nope, None, dv
    return o, dq[..., :n], dq[..., n:], dk_nope, dk[..., n:].sum(1).to(dtype), dv


def run(attention, arrays: dict, rest: dict) -> tuple:
    """(result, gradients of all five arrays). The cotangents of queries that see nothing are 0."""
    names = ("q_nope", "q_rope", "k_nope", "k_rope", "v")
    slots = np.arange(rest["segments_BS"].shape[1])
    sees = (slots <= np.arange(rest["segments_BT"].shape[1])[:, None] + rest["offset"]) & (
        rest["segments_BT"][..., None] == rest["segments_BS"][:, None]
    )
    real = jnp.asarray((sees & (rest["segments_BT"][..., None] > 0)).any(-1)[:, None, :, None])
    call = jax.jit(lambda xs, offset: grouped(attention)(*xs, **(rest | {"offset": offset})))
    o, pull = jax.vjp(lambda *xs: call(xs, jnp.int32(rest["offset"])), *(arrays[name] for name in names))
    return jnp.where(real, o, 0), *pull(jnp.where(real, arrays["g"], 0))


def distance(a, b) -> float:
    """Root mean square of the difference, relative to that of the truth, or to 1 (the inputs') if it is larger."""
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2) / max(np.mean(b**2), 1.0)))


@functools.cache
def true(name: str) -> tuple[Number | None, ...]:
    """The true results of a case, for all implementations."""
    return truth(*inputs((CASES | LARGE_SCORES)[name]))


def results(name: str, implementation: str) -> dict[str, tuple[np.ndarray, Number]]:
    """The result and each gradient, with the true ones."""
    arrays, rest = inputs((CASES | LARGE_SCORES)[name])
    attention = as_on_v5p if implementation == "pallas_v5p" else IMPLEMENTATIONS[implementation]
    names = ("o", "q_nope", "q_rope", "k_nope", "k_rope", "v")
    found = zip(names, run(attention, arrays, rest), true(name), strict=True)
    return {what: (np.asarray(got, np.float64), want) for what, got, want in found if want is not None}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, implementation) for name in CASES for implementation in IMPLEMENTATIONS]
    + [(name, "pallas_v5p") for name in ("mla_bf16", "several_blocks", "packed")],
)
def test_result_and_gradients_match_float64(name, implementation):
    for what, (got, want) in results(name, implementation).items():
        bounds.check(got, want, what)
        assert distance(got, want.value) < (2e-6 if CASES[name].dtype == "float32" else 5e-3), what


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LARGE_SCORES)
def test_scores_of_any_size(name, implementation):
    """The error of the weights follows from the scores' rounding, which the bounds include."""
    found = results(name, implementation)
    assert true(name)[0] is not None
    arrays, rest = inputs(LARGE_SCORES[name])
    norms = [
        np.linalg.norm(np.concatenate([arrays[a], np.broadcast_to(arrays[b], (*arrays[a].shape[:3], 8))], -1), axis=-1)
        for a, b in (("q_nope", "q_rope"), ("k_nope", "k_rope"))
    ]
    assert rest["scale"] * norms[0].max() * norms[1].max() > 500
    for what, (got, want) in found.items():
        bounds.check(got, want, what)


@pytest.mark.parametrize("name", ["mla", "mla_bf16", "packed", "large"])
def test_small_faults_are_found(name):
    """The bounds find a scale off by 1e-4 (large scores: 1e-2, bfloat16: 2e-2), and two missing keys."""
    off = {"mla_bf16": 2e-2, "large": 1e-2}.get(name, 1e-4)
    arrays, rest = inputs((CASES | LARGE_SCORES)[name])
    lacking = arrays | {key: arrays[key].at[..., 3:5, :].set(0) for key in ("k_nope", "k_rope", "v")}
    poorer = run(reference.latent_attention, lacking, rest)
    found = results(name, "xla")
    for what, (got, want) in found.items():
        assert max(bounds.ratios(got * (1 + off), want)) > 1, what
    for what, other in zip(found, poorer, strict=True):
        if name != "large" or what == "o":  # gradients vanish where one key has all weight
            assert max(bounds.ratios(other, found[what][1])) > 1, what


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_padding_reaches_no_real_token(implementation):
    arrays, rest = inputs(Case(t=200, s=200, documents=(60,), padding=(20, 30)))
    real_T, real_S = rest["segments_BT"][0] > 0, rest["segments_BS"][0] > 0

    def poisoned(name: str, x: jax.Array | None) -> jax.Array | None:
        real = real_T if name in ("q_nope", "q_rope", "g") else real_S
        return None if x is None else jnp.where(real[:, None], x, jnp.nan)

    bad = {name: poisoned(name, x) for name, x in arrays.items()}
    names = ("q_nope", "q_rope", "k_nope", "k_rope", "v")

    def results(arrays: dict) -> list[np.ndarray]:
        attend = functools.partial(grouped(IMPLEMENTATIONS[implementation]), **rest)
        o, pull = jax.vjp(attend, *(arrays[name] for name in names))
        return [np.asarray(x)[..., real_T, :] for x in (o, *pull(arrays["g"]))]  # T = S here

    for clean, dirty in zip(results(arrays), results(bad), strict=True):
        np.testing.assert_array_equal(clean, dirty)


def test_mistakes_raise():
    arrays, rest = inputs(Case(t=8, s=8))
    xs = [arrays[name] for name in ("q_nope", "q_rope", "k_nope", "k_rope", "v")]
    attend = grouped(latent_attention)
    with pytest.raises(ValueError, match="the kernels run on TPU v5e, v5p, v6e, tpu7x only"):
        attend(*xs, **rest)
    with pytest.raises(ValueError, match="give both or neither"):
        attend(xs[0], None, *xs[2:], **rest)
    with pytest.raises(ValueError, match="segments_BT"):
        attend(*xs, **(rest | {"segments_BT": rest["segments_BT"][:, :4]}))
    with pytest.raises(ValueError, match="k_nope is bfloat16"):
        attend(*xs[:2], xs[2].astype("bfloat16"), *xs[3:], **rest)


# Every chip compiles the kernels with and without rope keys; each other size, length and dtype one chip.
COMPILED = {
    "v5e": ["v2_lite", "gqa", "v2_lite:2000"],
    "v5p": ["v2_lite", "gqa", "v2"],
    "v6e": ["v2_lite", "gqa", "v2_lite:1024:16384"],
    "tpu7x": ["v2_lite", "gqa", "nano", "nano:1:300", "nano:float32"],
}


@pytest.mark.tpu
@pytest.mark.parametrize("chip", TPUS)
def test_compiles_for_tpus(chip):
    cases = COMPILED[chip]
    script = Path(__file__).with_name("compile_latent_attention.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, TPUS[chip]), *cases],
        cwd=script.parents[2],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\n")[:-1] == [f"compiled {case}" for case in cases], done.stderr[-2000:]
