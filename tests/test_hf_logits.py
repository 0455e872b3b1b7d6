"""What an export answers under transformers, against our own model and a float64 one written out here."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from hf_cases import make_run

from configs import models
from dsv2_jax.config import Attention, Model, Moe, Rope
from dsv2_jax.hf import export


def exported(folder: Path, model: Model) -> tuple[dict, torch.nn.Module]:
    """Random parameters in float64, and transformers' model of their export."""
    params = make_run(folder / "run", model)
    export(folder / "run", folder / "hf")
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), params), judge


def grouped_query_logits(params: dict, model: Model, ids_T: np.ndarray) -> np.ndarray:
    """Float64 logits [T, W] of a dense model with grouped queries whose RoPE turns neighbouring pairs (2i, 2i + 1)."""
    a, rope, p = model.attention, model.rope, params["dense"]
    width, time = a.qk_rope_head_dim, np.arange(len(ids_T))
    plain = rope.theta ** -(np.arange(0, width, 2) / width)

    def turns_at(turns: float) -> float:  # the dimension that turns so often over the original length
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
    """Pairs against halves, YaRN, and the whole of mscale on queries and keys."""
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
