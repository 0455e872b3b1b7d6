"""The parameter tree and its first values; packing, padding and layer forms for every kind of attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import gqa, lite, random_params

from configs import PRESETS, models
from dsv2_jax import parameters
from dsv2_jax.config import SINGLE, Attention, Compute, Model, Moe
from dsv2_jax.model import attention, rope, transformer
from dsv2_jax.model.layers import cast
from dsv2_jax.ops import pages, switch
from dsv2_jax.ops.attention import PackedTokens
from dsv2_jax.ops.switch import Execution

EXACT = Compute(dtype="float32", remat="none")


def with_kv_heads(heads: int) -> Model:
    return dataclasses.replace(gqa(), attention=dataclasses.replace(gqa().attention, num_key_value_heads=heads))


def gqa_with_experts() -> Model:
    return dataclasses.replace(gqa(), first_k_dense_replace=1, moe=models.tiny().moe)


MODELS = {
    "mla": models.tiny(),
    "mla without query compression": lite(),
    "gqa": gqa_with_experts(),
    "mha": with_kv_heads(4),
    "mqa": with_kv_heads(1),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model = MODELS[request.param]
    return model, jax.tree.map(jnp.asarray, random_params(model))


@functools.partial(jax.jit, static_argnames=("model", "compute"))
def logits_of(params, tokens, positions, segments, *, model, compute=EXACT):
    batch = {"tokens_BT": tokens, "positions_BT": positions, "segments_BT": segments}
    return transformer.logits(params, transformer.forward(params, batch, model=model, compute=compute).hidden_BTD)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_table(name):
    model = PRESETS[name]().model
    made = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, made) == parameters.tree(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == parameters.count(model)


def test_released_sizes():
    """236B and 21B, 15.7B and 2.4B (section 3.1.2, App. B), and the baseline's 67B."""
    billions = {name: parameters.count(PRESETS[name]().model) / 1e9 for name in ("v2", "v2_lite", "dense_67b")}
    assert billions == pytest.approx({"v2": 235.7, "v2_lite": 15.7, "dense_67b": 67.4}, rel=2e-3)
    assert parameters.count_activated(models.v2()) / 1e9 == pytest.approx(21, abs=0.5)
    assert parameters.count_activated(models.v2_lite()) / 1e9 == pytest.approx(2.4, abs=0.1)


def test_first_values():
    """Normal with the config's deviation, every layer and leaf drawn apart; norm scales one."""
    model = models.tiny()
    params = jax.device_get(jax.jit(functools.partial(transformer.init, model))(jax.random.key(3)))
    seen = set()
    for part, leaves in params.items():
        for name, leaf in leaves.items():
            if name.startswith("norm"):
                assert (leaf == 1).all(), (part, name)
                continue
            # Bounds of five standard errors.
            sigma, n = model.initializer_range, leaf.size
            assert abs(leaf.std() - sigma) < 5 * sigma / np.sqrt(2 * n), (part, name)
            assert abs(leaf.mean()) < 5 * sigma / np.sqrt(n), (part, name)
            assert n < 10_000 or np.abs(leaf).max() > 3 * sigma, (part, name)  # not truncated
            seen |= {stack.tobytes()[:64] for stack in (leaf if part in ("dense", "moe") else [leaf])}
    assert len(seen) == sum(
        shape[0] if part in ("dense", "moe") else 1
        for part, leaves in parameters.tree(model).items()
        for name, shape in leaves.items()
        if not name.startswith("norm")
    )


def rows(*documents_of_rows: list[tuple[int, np.ndarray]], width: int = 32) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segments of rows given as (first slot, ids) of each document."""
    tokens, positions, segments = (np.zeros((len(documents_of_rows), width), np.int32) for _ in range(3))
    for row, documents in enumerate(documents_of_rows):
        for number, (start, ids) in enumerate(documents, 1):
            place = slice(start, start + len(ids))
            tokens[row, place], positions[row, place], segments[row, place] = ids, np.arange(len(ids)), number
    return tokens, positions, segments


def two_documents() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(4).integers(0, 384, 29)
    return ids[:12], ids[12:]


def test_a_document_answers_the_same_alone_packed_and_padded(case):
    model, params = case
    a, b = two_documents()
    alone = np.asarray(logits_of(params, *rows([(0, a)], [(0, b)]), model=model))
    shared = np.asarray(logits_of(params, *rows([(0, a), (12, b)], [(15, b)]), model=model))
    assert alone[1, :17].std() > 0.5
    np.testing.assert_allclose(shared[0, :12], alone[0, :12], atol=2e-5)
    np.testing.assert_allclose(shared[0, 12:29], alone[1, :17], atol=2e-5)
    np.testing.assert_allclose(shared[1, 15:], alone[1, :17], atol=2e-5)


def test_the_future_is_not_seen(case):
    model, params = case
    b = two_documents()[1]
    other = b.copy()
    other[9:] = (other[9:] + 1) % 384
    left, right = np.asarray(logits_of(params, *rows([(0, b)], [(0, other)]), model=model))
    np.testing.assert_allclose(left[:9], right[:9], atol=2e-5)
    assert np.abs(left[9:17] - right[9:17]).max() > 0.1


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_unrolled_are_those_of_the_scan(remat):
    """Training on CPU unrolls a shallow network and leaves a deep one stacked."""
    model = MODELS["mla"]
    params = jax.tree.map(jnp.asarray, random_params(model))
    a, b = two_documents()
    inputs = rows([(0, a)], [(0, b)])
    batch = {f"{name}_BT": x for name, x in zip(("tokens", "positions", "segments"), inputs, strict=True)}
    compute = Compute(dtype="float32", remat=remat)

    def square(params, arrange):
        out = transformer.forward(arrange(params), batch, model=model, compute=compute)
        return jnp.sum(out.hidden_BTD**2) + out.statistics["expert_balance"].sum()

    scanned, unrolled = (
        jax.jit(jax.grad(functools.partial(square, arrange=arrange)))(params)
        for arrange in (lambda params: params, transformer.unstack)
    )
    for mine, theirs in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))
    assert switch.unrolls(model, SINGLE)
    assert not switch.unrolls(dataclasses.replace(model, num_hidden_layers=17), SINGLE)


def test_the_unrolled_form_agrees_with_the_scanned_one(case):
    model, params = case
    a, b = two_documents()
    inputs = rows([(5, a)], [(0, b)])
    scanned = logits_of(params, *inputs, model=model)
    unrolled = logits_of(transformer.unstack(params), *inputs, model=model)
    np.testing.assert_allclose(unrolled, scanned, atol=5e-5)


def test_the_absorbed_form_is_the_expanded_one():
    """Sections 2.1.2 and App. C, with two documents and padding in a row; both held to float64."""
    model, rng = models.tiny(), np.random.default_rng(0)
    a, (b, t) = model.attention, (2, 12)
    h, c, n, r, v = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    shapes = [(b, t, h, n), (b, t, h, r), (b, t, c), (b, t, r), (c, h, n), (c, h, v)]
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = exact = [rng.standard_normal(shape) for shape in shapes]
    segments = np.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    tokens = PackedTokens((jnp.zeros(()), jnp.zeros(())), jnp.asarray(segments), jnp.asarray(segments))
    *q, latent_BSC, k_rope_BSR, w_uk_CHN, w_uv_CHV = (jnp.asarray(x, jnp.float32) for x in exact)
    p = {"w_uk_CHN": w_uk_CHN, "w_uv_CHV": w_uv_CHV}
    expanded = attention.expanded(p, tuple(q), latent_BSC, k_rope_BSR, tokens, model, Execution())
    absorbed = attention.absorbed(p, tuple(q), latent_BSC, k_rope_BSR, tokens, model)

    scores = np.einsum("bthn,bshn->bhts", q_nope, np.einsum("bsc,chn->bshn", latent, w_uk))
    scores = rope.softmax_scale(model) * (scores + np.einsum("bthr,bsr->bhts", q_rope, k_rope))
    sees = np.tri(t, dtype=bool) & (segments[:, :, None] == segments[:, None])
    weights = np.where(sees[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("bhts,bshv->bthv", weights, np.einsum("bsc,chv->bshv", latent, w_uv))
    real = segments > 0
    for got in (expanded, absorbed):
        np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_cache_holds_what_the_table_says(case):
    """Table 1: elements a token over all layers."""
    model, _ = case
    layers = pages.empty(model, SINGLE, 3, 7, "compute", jnp.dtype(jnp.float32))
    a = model.attention
    width = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.num_key_value_heads * a.v_head_dim
    assert sum(leaf.size for leaf in jax.tree.leaves(layers)) == 3 * 7 * model.num_hidden_layers * width
    assert model.cache_elements == model.num_hidden_layers * width


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_bfloat16_stays_near_float32(name):
    """The root mean square error in units of the logits' deviation.

    bfloat16 keeps 8 bits, so a rounding is off by up to 2^-9 of the value, 2^-9 / sqrt(3) in the mean. About ten
    roundings in each of the two branches of three layers, as independent errors: sqrt(60) 2^-9 / sqrt(3) = 0.9%.
    Allowed is three times that. No experts here, for a choice that flips at a near tie is no rounding error.
    """
    model = MODELS[name]
    model = dataclasses.replace(model, first_k_dense_replace=0, moe=Moe(n_routed_experts=0))
    params = jax.tree.map(jnp.asarray, random_params(model))
    a, b = two_documents()
    inputs = rows([(0, a)], [(0, b)])
    exact = np.asarray(logits_of(params, *inputs, model=model))
    low = dataclasses.replace(EXACT, dtype="bfloat16")
    rounded = logits_of(cast(params, jnp.bfloat16), *inputs, model=model, compute=low)
    assert rounded.dtype == jnp.bfloat16
    error = (np.asarray(rounded, np.float32) - exact)[inputs[2] > 0]
    ratio = np.sqrt((error**2).mean()) / exact[inputs[2] > 0].std()
    assert 1e-4 < ratio < 0.027


def test_cast_keeps_norms_gate_and_embedding_in_float32():
    params = jax.tree.map(jnp.asarray, random_params(models.tiny()))
    low = cast(params, jnp.bfloat16)
    kept = {name for part in low.values() for name, leaf in part.items() if leaf.dtype == jnp.float32}
    names = {name for part in low.values() for name in part}
    assert kept == {name for name in names if name.startswith("norm")} | {"w_router_DE", "w_embed_WD"}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_kinds_are_what_they_say():
    """MHA has a KV head for each head; its parameters are those of GQA with that number (App. D.1)."""
    shapes = {name: parameters.tree(MODELS[name])["dense"]["w_k_DJR"] for name in ("gqa", "mha", "mqa")}
    assert {name: shape[2] for name, shape in shapes.items()} == {"gqa": 2, "mha": 4, "mqa": 1}
    with pytest.raises(ValueError, match="must be a multiple"):
        Attention(kind="gqa", num_key_value_heads=3, q_lora_rank=0, kv_lora_rank=0, qk_nope_head_dim=0)
