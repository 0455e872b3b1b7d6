"""Attention over pages in fewer bits: MLA by the TPU's kernel, run step by step on CPU, and by plain XLA; GQA."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from configs import models
from dsv2_jax.config import SINGLE, Attention
from dsv2_jax.model import paged
from pallas_kernels.latent_attention import decode_kernel

SLOTS = 128
GQA = Attention(
    kind="gqa",
    num_attention_heads=4,
    num_key_value_heads=2,
    q_lora_rank=0,
    kv_lora_rank=0,
    qk_nope_head_dim=0,
    qk_rope_head_dim=16,
    v_head_dim=12,
)
TABLE = np.array([[3, 1], [4, 0], [2, 5]])  # sequences of 130, 7 and 140 tokens


def where(sequences, times, blocks, used: int) -> paged.Where:
    """Tokens of these sequences (-1: padding) at these places, the last len(blocks) of them a chunk."""
    pages = [TABLE[n, t // SLOTS] if n >= 0 else 0 for n, t in zip(sequences, times, strict=True)]
    plan = paged.Plan(*(jnp.asarray(x, jnp.int32) for x in (TABLE, pages, times, blocks, used)))
    return paged.Where((jnp.zeros(()), jnp.zeros(())), jnp.zeros(()), plan, "int6")


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
    (layer,) = paged.empty(dataclasses.replace(model, num_hidden_layers=1), SINGLE, 6, SLOTS, "int6", jnp.float32)
    rows = {"latent_LKC": normal(len(times), c), "rope_LRK": normal(len(times), r)}
    layer = paged._write(layer, rows, where(sequences, times, [], 0))

    # A token each of the first two, and three of the third as a chunk, whose own row and last place are padding.
    now = where([0, 1, -1, 2, 2, 2, -1], [129, 6, 0, 137, 138, 139, 0], [2, 2, 2, 0], 3)
    weights = {"w_uk_CHN": normal(c, h, a.qk_nope_head_dim), "w_uv_CHV": normal(c, h, a.v_head_dim)}
    tokens = normal(1, 7, h, a.qk_nope_head_dim), normal(1, 7, h, r), normal(1, 7, c), normal(1, 7, r)
    theirs, filled = paged.latent(weights, *tokens, now, layer, model)

    def decode(*arrays, implementation: str, **rest):
        assert implementation == "pallas"
        blocks = decode_kernel.Blocks(pages=1, streams=1, tokens=2)
        return decode_kernel.decode(*arrays, **rest, blocks=blocks, interpret=True)

    monkeypatch.setattr(paged, "decode", decode)
    monkeypatch.setattr(paged, "has_kernel", lambda _: True)
    ours, refilled = paged.latent(weights, *tokens, now, layer, model)
    real = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(ours[0, real], theirs[0, real], rtol=1e-5, atol=1e-5)
    assert filled.keys() == refilled.keys() == layer.keys()
    for name, array in filled.items():
        np.testing.assert_array_equal(array, refilled[name])


def test_grouped_queries_read_what_was_written_in_fewer_bits():
    """Two heads of keys whose sizes differ a thousandfold: each has scales of its own."""
    model = dataclasses.replace(models.tiny(), num_hidden_layers=1, attention=GQA)
    rng = np.random.default_rng(0)
    sizes = ((4, 16), (2, 16), (2, 12))
    q, k, v = (jnp.asarray(rng.standard_normal((1, 12, *size)), jnp.float32) for size in sizes)
    v = v * jnp.array([1.0, 1000.0])[:, None]
    outs = []
    for kept in ("compute", "int6"):
        (layer,) = paged.empty(model, SINGLE, 6, SLOTS, kept, jnp.float32)
        at = where([-1, -1, -1, *[1] * 9], [0, 0, 0, *range(9)], [1] * 9, 9)._replace(form=kept)
        outs.append(paged.grouped_queries(q, k, v, at, layer, model)[0][0, 3:])
    scale = np.repeat([1.0, 1000.0], 2)[:, None]
    np.testing.assert_allclose(outs[1] / scale, outs[0] / scale, atol=0.08)
