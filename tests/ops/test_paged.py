"""Attention over pages in fewer bits: MLA by the TPU's kernel, run step by step on CPU, and by plain XLA; GQA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import GQA

from configs import models
from dsv2_jax.config import SINGLE, Compute
from dsv2_jax.inference import programs
from dsv2_jax.model import attention, rope
from dsv2_jax.ops import attention as ops
from dsv2_jax.ops import pages
from dsv2_jax.ops.attention import PagedTokens
from dsv2_jax.ops.cpu.experts import grouped_swiglu
from dsv2_jax.ops.pages import Placement
from dsv2_jax.ops.switch import Execution
from pallas_kernels.latent_attention import decode_kernel
from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks

SLOTS = 128
TABLE = np.array([[3, 1], [4, 0], [2, 5]])  # sequences of 130, 7 and 140 tokens


def placed(sequences, times, blocks, used: int) -> Placement:
    """Tokens of these sequences (-1: padding) at these places, the last len(blocks) of them a chunk."""
    page_T = [TABLE[n, t // SLOTS] if n >= 0 else 0 for n, t in zip(sequences, times, strict=True)]
    return Placement(*(jnp.asarray(x, jnp.int32) for x in (TABLE, page_T, times, blocks, used)))


def paged(placement: Placement, form: str) -> PagedTokens:
    """Tokens without phases and segments, which attention over pages does not read."""
    return PagedTokens((jnp.zeros(()), jnp.zeros(())), jnp.zeros(()), placement, form)


def test_the_kernel_reads_what_xla_reads(monkeypatch):
    """Of a cache in 6 bits, which has all that others have and scales besides."""
    tiny = models.tiny()
    model = dataclasses.replace(tiny, attention=dataclasses.replace(tiny.attention, qk_rope_head_dim=16))
    a, rng = model.attention, np.random.default_rng(0)
    h, c, r = a.num_attention_heads, a.kv_lora_rank, a.qk_rope_head_dim

    def normal(*size: int):
        return jnp.asarray(rng.standard_normal(size), jnp.float32)

    sequences = [n for n, length in enumerate((129, 6, 137)) for _ in range(length)]
    times = [t for length in (129, 6, 137) for t in range(length)]
    (layer,) = pages.empty(dataclasses.replace(model, num_hidden_layers=1), SINGLE, 6, SLOTS, "int6", jnp.float32)
    rows = {"latent_LKC": normal(len(times), c), "rope_LRK": normal(len(times), r)}
    layer = pages.write(layer, rows, placed(sequences, times, [], 0), "int6")

    # A token each of the first two, and three of the third as a chunk, whose own row and last place are padding.
    now = paged(placed([0, 1, -1, 2, 2, 2, -1], [129, 6, 0, 137, 138, 139, 0], [2, 2, 2, 0], 3), "int6")
    weights = {"w_uk_HCN": normal(h, c, a.qk_nope_head_dim), "w_uv_HVC": normal(h, a.v_head_dim, c)}
    q, rows = (normal(1, 7, h, a.qk_nope_head_dim), normal(1, 7, h, r)), (normal(1, 7, c), normal(1, 7, r))
    theirs, filled = attention.absorbed_over_pages(weights, q, *rows, now, layer, model, Execution())

    def decode(*arrays, **rest):
        blocks = DecodeBlocks(pages=1, streams=1, tokens=2)
        return decode_kernel.decode(*arrays, **rest, blocks=blocks, interpret=True)

    monkeypatch.setattr(ops, "latent_decode", decode)
    run = Execution(implementation="pallas")
    ours, refilled = attention.absorbed_over_pages(weights, q, *rows, now, layer, model, run)
    real = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(ours[0, real], theirs[0, real], rtol=1e-5, atol=1e-5)
    assert filled.keys() == refilled.keys() == layer.keys()
    for name, array in filled.items():
        np.testing.assert_array_equal(array, refilled[name])


def test_new_tokens_of_many_sequences_against_float64():
    """More sequences than one iteration takes, and no multiple of that; they have one to sixty tokens."""
    model = dataclasses.replace(models.tiny(), num_hidden_layers=1)
    a, rng = model.attention, np.random.default_rng(0)
    n, slots, (h, c, r) = 21, 16, (a.num_attention_heads, a.kv_lora_rank, a.qk_rope_head_dim)
    lengths = rng.integers(1, 61, n)  # the new token included
    table = 1 + rng.permutation(n * 4).reshape(n, 4)

    def at(sequences, times) -> Placement:
        page_T = table[sequences, np.array(times) // slots]
        return Placement(*(jnp.asarray(x, jnp.int32) for x in (table, page_T, times, [], 0)))

    latents, ropes = rng.standard_normal((n, 60, c)), rng.standard_normal((n, 60, r))
    old = [(i, t) for i, length in enumerate(lengths) for t in range(length - 1)]
    sequences, times = map(np.array, zip(*old, strict=True))
    (layer,) = pages.empty(model, SINGLE, 1 + n * 4, slots, "compute", jnp.float32)
    rows = {"latent_LKC": latents[sequences, times], "rope_LRK": ropes[sequences, times]}
    rows = {k: jnp.asarray(x, jnp.float32) for k, x in rows.items()}
    layer = pages.write(layer, rows, at(sequences, times), "compute")

    q_nope, q_rope = rng.standard_normal((n, h, a.qk_nope_head_dim)), rng.standard_normal((n, h, r))
    w_uk, w_uv = rng.standard_normal((c, h, a.qk_nope_head_dim)), rng.standard_normal((c, h, a.v_head_dim))
    every, last = np.arange(n), lengths - 1
    new = (q_nope, q_rope, latents[every, last], ropes[every, last])
    *q, latent_BTC, k_rope_BTR = (jnp.asarray(x[None], jnp.float32) for x in new)
    weights = {"w_uk_CHN": jnp.asarray(w_uk, jnp.float32), "w_uv_CHV": jnp.asarray(w_uv, jnp.float32)}
    p, now = attention.by_head({"moe_0": weights})["moe_0"], paged(at(every, last), "compute")
    got, _ = attention.absorbed_over_pages(p, tuple(q), latent_BTC, k_rope_BTR, now, layer, model, Execution())

    for i, length in enumerate(lengths):
        keys = np.einsum("sc,chn->shn", latents[i, :length], w_uk)
        scores = np.einsum("hn,shn->hs", q_nope[i], keys) + q_rope[i] @ ropes[i, :length].T
        p = np.exp(rope.softmax_scale(model) * (scores - scores.max(axis=1, keepdims=True)))
        values = np.einsum("sc,chv->shv", latents[i, :length], w_uv)
        want = np.einsum("hs,shv->hv", p / p.sum(axis=1, keepdims=True), values)
        np.testing.assert_allclose(got[0, i], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_bfloat16_call_copies_neither_pages_nor_experts():
    """On CPU XLA widens complete bfloat16 buffers unless they are copied as bits. A call's temporaries show it."""
    model, compute = dataclasses.replace(models.tiny(), num_hidden_layers=2), Compute(dtype="bfloat16")
    setup = programs.Setup(model=model, compute=compute, form="compute", weights="compute", devices=None)

    def temporaries(count: int) -> int:
        prepared, layers = programs.described(setup, count, 16)
        lowered = programs.forward.lower(prepared, layers, programs.blank(1, 4, 0, 0, 2), setup=setup)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2000) == temporaries(20)
    m = model.moe
    weights = [jnp.zeros((m.n_routed_experts, *s), jnp.bfloat16) for s in ((64, 32), (64, 32), (32, 64))]
    x, ids, gates = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2))
    compiled = jax.jit(grouped_swiglu).lower(x, ids, gates, tuple(weights)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weights[0].nbytes


def test_grouped_queries_read_what_was_written_in_fewer_bits():
    """Two heads of keys whose sizes differ a thousandfold: each has scales of its own."""
    model = dataclasses.replace(models.tiny(), num_hidden_layers=1, attention=GQA)
    rng = np.random.default_rng(0)
    sizes = ((4, 16), (2, 16), (2, 12))
    q, k, v = (jnp.asarray(rng.standard_normal((1, 12, *size)), jnp.float32) for size in sizes)
    v = v * jnp.array([1.0, 1000.0])[:, None]
    outs = []
    for kept in ("compute", "int6"):
        (layer,) = pages.empty(model, SINGLE, 6, SLOTS, kept, jnp.float32)
        at = paged(placed([-1, -1, -1, *[1] * 9], [0, 0, 0, *range(9)], [1] * 9, 9), kept)
        outs.append(ops.paged_grouped(q, k, v, at, layer, scale=rope.softmax_scale(model))[0][0, 3:])
    scale = np.repeat([1.0, 1000.0], 2)[:, None]
    np.testing.assert_allclose(outs[1] / scale, outs[0] / scale, atol=0.08)
