"""Logits, gradients and greedy text of an export under transformers and mlx-lm, against our model and float64."""

import dataclasses
from pathlib import Path

import jax
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from tiny import MODELS, lite, make_run, rows_of, training_rows

from configs import models
from dsv2_jax.config import Attention, Batch, Compute, Config, Model, Moe, Rope
from dsv2_jax.hf import export, load_params, names
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.model import transformer
from dsv2_jax.training.loss import loss

EXACT = Compute(dtype="float32", remat="none", loss_chunk=16)


def exported(folder: Path, model: Model) -> tuple[dict, torch.nn.Module]:
    """Random parameters in float64, and transformers' model of their export."""
    params = make_run(folder / "run", model)
    export(folder / "run", folder / "hf")
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), params), judge


def grouped_query_logits(params: dict, model: Model, ids_T: np.ndarray) -> np.ndarray:
    """Float64 logits [T, W] of a dense model with grouped queries. Its RoPE rotates neighbouring pairs (2i, 2i + 1)."""
    a, rope, p = model.attention, model.rope, params["dense"]
    width, time = a.qk_rope_head_dim, np.arange(len(ids_T))
    plain = rope.theta ** -(np.arange(0, width, 2) / width)

    def turns_at(turns: float) -> float:  # the dimension with this number of rotations over the original length
        length = rope.original_max_position_embeddings
        return width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))

    low, high = max(np.floor(turns_at(rope.beta_fast)), 0), min(np.ceil(turns_at(rope.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    turn = np.exp(1j * time[:, None] * (plain / rope.factor * ramp + plain * (1 - ramp)))[:, None]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.rms_norm_eps) * weight

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    scale = width**-0.5 * (0.1 * rope.mscale * np.log(rope.factor) + 1) ** 2
    x_TD = params["embed"]["w_embed_WD"][ids_T]
    for i in range(model.num_hidden_layers):
        y_TD = norm(x_TD, p["norm_attention_D"][i])
        q = turned(np.einsum("td,dhr->thr", y_TD, p["w_q_DHR"][i]))
        k = turned(np.einsum("td,djr->tjr", y_TD, p["w_k_DJR"][i]))
        v = np.einsum("td,djv->tjv", y_TD, p["w_v_DJV"][i])
        share = a.num_attention_heads // a.num_key_value_heads
        scores = np.einsum("thr,shr->hts", q, np.repeat(k, share, 1)) * scale
        scores = np.where(time[:, None] >= time, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x_TD = x_TD + np.einsum("hts,shv,hvd->td", weights, np.repeat(v, share, 1), p["w_o_HVD"][i])
        y_TD = norm(x_TD, p["norm_ffn_D"][i])
        gate = y_TD @ p["w_gate_DI"][i]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (y_TD @ p["w_up_DI"][i])) @ p["w_down_ID"][i]
    return norm(x_TD, params["head"]["norm_D"]) @ params["head"]["w_head_DW"]


def test_a_grouped_query_export_is_the_llama_that_we_mean(tmp_path):
    """Rotation of pairs against rotation of halves, YaRN, and all of mscale on queries and keys."""
    attention = Attention(
        kind="gqa",
        num_attention_heads=4,
        num_key_value_heads=2,
        q_lora_rank=0,
        kv_lora_rank=0,
        qk_nope_head_dim=0,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    rope = Rope(factor=8.0, original_max_position_embeddings=128, beta_fast=4.0, mscale=0.9, mscale_all_dim=0.4)
    model = dataclasses.replace(
        models.tiny(), attention=attention, moe=Moe(n_routed_experts=0), first_k_dense_replace=0, rope=rope
    )
    params, judge = exported(tmp_path, model)
    ids = np.random.default_rng(1).integers(0, 160, 300)
    with torch.no_grad():
        theirs = judge(torch.tensor(ids)[None]).logits[0].numpy()
    assert theirs.std() > 1
    np.testing.assert_allclose(theirs, grouped_query_logits(params, model, ids), atol=1e-4)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """An exported folder, our model and parameters read from it, and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    _, judge = exported(folder, MODELS[request.param]())
    return folder / "hf", *load_params(folder / "hf"), judge


def test_logits_are_those_of_transformers_and_mlx_lm(case):
    """200 tokens, beyond the original context of 128 where the model stretches it."""
    hf, model, params, judge = case
    ids = np.random.default_rng(2).integers(0, model.vocab_size, (1, 200))
    out = jax.jit(lambda p, b: transformer.forward(p, b, model=model, compute=EXACT))(params, rows_of(ids))
    mine = np.asarray(transformer.logits(params, out.hidden_BTD))
    with torch.no_grad():
        theirs = judge(torch.tensor(ids)).logits.numpy()
    assert 1 < theirs.std() < 3
    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
    other, _ = mlx_lm.utils.load_model(hf)
    with mx.stream(mx.cpu):
        np.testing.assert_allclose(mine, np.array(other(mx.array(ids))), atol=2e-4, rtol=0)


def test_greedy_continuations_are_those_of_transformers(case):
    """A short and a long prompt in one batch; transformers takes them one by one."""
    _, model, params, judge = case
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, model.vocab_size, length).tolist() for length in (3, 60)]
    engine = Engine(params, model, compute=EXACT, capacity=Capacity(rows=2, length=128, chunk=64, page=16))
    mine = engine.generate([Request(prompt=tuple(prompt), max_new=64) for prompt in prompts])
    for prompt, result in zip(prompts, mine, strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = judge.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert list(result.tokens) == theirs[0, len(prompt) :].tolist()


def gradients_by_file_names(judge: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients under the names of the released files: one tensor an expert."""
    found = {name: p.grad.numpy() for name, p in judge.named_parameters() if p.grad is not None}
    for name in [name for name in found if name.endswith("mlp.experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        fused, down = found.pop(name), found.pop(stem + "down_proj")
        for e in range(len(fused)):
            gate, up = np.split(fused[e], 2)
            found |= {f"{stem}{e}.gate_proj.weight": gate, f"{stem}{e}.up_proj.weight": up}
            found[f"{stem}{e}.down_proj.weight"] = down[e]
    return found


def without_yarn() -> Model:
    return dataclasses.replace(models.tiny(), rope=Rope(original_max_position_embeddings=1024))


def lite_with_yarn() -> Model:
    return dataclasses.replace(lite(), rope=models.tiny().rope)


@pytest.mark.parametrize("make", [lite_with_yarn, without_yarn])
def test_loss_and_gradients_are_those_of_transformers(make, tmp_path):
    """Without balance losses and dropping, which transformers does not have."""
    _, judge = exported(tmp_path, make())
    model, params = load_params(tmp_path / "hf")
    moe = dataclasses.replace(model.moe, **dict.fromkeys(model.moe.balances(), 0.0), capacity_factor=0.0)
    model = dataclasses.replace(model, moe=moe)
    config = Config(workdir=tmp_path, model=model, batch=Batch(size=2, length=40), tokens=1000, compute=EXACT)
    ids = np.random.default_rng(4).integers(0, model.vocab_size, (2, 41))
    batch = training_rows(ids)

    def total(p):
        return loss(p, batch, config=config, exempt_B=None, total_weight=80.0, share=1.0)[0]

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    answer = judge(torch.tensor(ids), labels=torch.tensor(ids)).loss
    answer.backward()
    assert float(value) == pytest.approx(answer.item(), rel=2e-6)
    theirs = gradients_by_file_names(judge)
    tensors = names.tensors(model)
    assert {tensor.hf for tensor in tensors} == set(theirs)
    for tensor in tensors:
        mine = tensor.layout.to_hf([np.asarray(gradients[tensor.part][n])[tensor.index] for n in tensor.names])
        scale = np.abs(theirs[tensor.hf]).max()
        np.testing.assert_allclose(mine, theirs[tensor.hf], atol=1e-4 * scale, rtol=0, err_msg=tensor.hf)
