"""config.json in both directions: against the released V2 and against what transformers writes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import transformers
from tiny import GOLDEN, RELEASED_V2
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

from configs import models
from dsv2_jax.config import Attention, Model, Moe, Rope
from dsv2_jax.hf import from_hf_config, to_hf_config

LLAMA = to_hf_config(models.dense_67b())


def test_the_released_v2_both_ways():
    model = from_hf_config(RELEASED_V2)
    released = dataclasses.replace(
        models.v2(),
        max_position_embeddings=163840,
        initializer_range=0.02,
        rope=Rope(factor=40.0),
        moe=dataclasses.replace(models.v2().moe, expert_balance=0.001),
    )
    assert model == released
    ours = to_hf_config(model, "bfloat16", bos=100000, eos=100001)
    dropped = ("auto_map", "transformers_version")
    assert ours == {name: value for name, value in RELEASED_V2.items() if name not in dropped}


@pytest.mark.parametrize("name", ["v2_tiny", "mscale_tiny"])
def test_both_styles_give_the_same_model(name):
    released, hf5 = (json.loads((GOLDEN / name / f).read_text()) for f in ("config.json", "config_hf5.json"))
    model = from_hf_config(released)
    assert model == from_hf_config(hf5)
    assert from_hf_config(to_hf_config(model)) == model
    if name == "v2_tiny":
        assert model == Model(
            vocab_size=160,
            hidden_size=64,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=112,
            max_position_embeddings=5120,
            initializer_range=0.02,
            attention=Attention(
                num_attention_heads=4,
                q_lora_rank=40,
                kv_lora_rank=32,
                qk_nope_head_dim=16,
                qk_rope_head_dim=16,
                v_head_dim=24,
            ),
            rope=Rope(factor=40.0, original_max_position_embeddings=128),
            moe=Moe(n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=24, expert_balance=0.001),
        )


@pytest.mark.parametrize("preset", [models.v2, models.v2_lite, models.dense_67b, models.nano, models.tiny])
def test_presets_come_back(preset):
    """All settings that a config.json has; the others take our defaults."""
    model = preset()
    back = from_hf_config(json.loads(json.dumps(to_hf_config(model))))
    untold = {
        name: getattr(Moe(), name)
        for name in (*Moe.balances(), "capacity_factor", "exempt_fraction")
        if name != "expert_balance"
    }
    moe = dataclasses.replace(model.moe, **untold)
    rope = back.rope if model.attention.kind == "gqa" else model.rope  # null in Llama's when nothing is stretched
    assert back == dataclasses.replace(model, moe=moe, rope=rope)
    assert back.rope.theta == model.rope.theta


@pytest.mark.parametrize(
    ("raw", "change", "told"),
    [
        (RELEASED_V2, {"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'; supported: deepseek_v2, llama"),
        (RELEASED_V2, {"norm_topk_prob": True}, "norm_topk_prob is True, which is not supported"),
        (RELEASED_V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'.* must be 'softmax'"),
        (RELEASED_V2, {"moe_layer_freq": 2}, "moe_layer_freq is 2.* must be 1"),
        (RELEASED_V2, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (RELEASED_V2, {"attention_bias": True}, "attention_bias is True"),
        (RELEASED_V2, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (RELEASED_V2, {"quantization_config": {"bits": 8}}, "quantization_config"),
        (RELEASED_V2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        (RELEASED_V2, {"n_group": None}, "lacks n_group"),
        (RELEASED_V2, {"kv_lora_rank": None, "vocab_size": 1}, "lacks kv_lora_rank"),
        (RELEASED_V2, {"num_key_value_heads": 8}, "num_key_value_heads is 8; .* must equal"),
        (RELEASED_V2, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling has the type 'linear'"),
        (RELEASED_V2, {"rope_scaling": {"type": "yarn", "factor": 40}}, "lacks original_max_position_embeddings"),
        (RELEASED_V2, {"hidden_size": "5120"}, "hidden_size must be a number, not '5120'"),
        (RELEASED_V2, {"n_routed_experts": 161}, "must be a multiple of moe.n_group"),
        (LLAMA, {"rope_scaling": RELEASED_V2["rope_scaling"]}, "mscale_all_dim is 0.707; .* must be 0 or absent"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_sentence(raw, change, told):
    with pytest.raises(ValueError, match=told) as error:
        from_hf_config(raw | change)
    assert "\n" not in str(error.value)


def test_attention_factor_must_agree():
    yarn = RELEASED_V2["rope_scaling"]
    assert from_hf_config(RELEASED_V2 | {"rope_scaling": yarn | {"attention_factor": 1.0}}).rope == Rope(factor=40.0)
    with pytest.raises(ValueError, match=r"attention_factor is 1.3, but its mscale and mscale_all_dim give 1.0"):
        from_hf_config(RELEASED_V2 | {"rope_scaling": yarn | {"attention_factor": 1.3}})


def test_absent_mscale_is_as_in_the_released_code():
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    rope = from_hf_config(RELEASED_V2 | {"rope_scaling": yarn}).rope
    assert (rope.mscale, rope.mscale_all_dim) == (1.0, 0.0)
    plain = from_hf_config({**RELEASED_V2, "rope_scaling": None, "rope_theta": 5e5}).rope
    assert (plain.factor, plain.theta, plain.original_max_position_embeddings) == (1.0, 5e5, 163840)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "cosines"),
    [
        (0.707, 0.707, 1.0),
        (1.0, 0.5, (1 + 0.1 * math.log(8)) / (1 + 0.05 * math.log(8))),
        (0.7, 0.0, 1 + 0.07 * math.log(8)),
        (0.0, 0.7, 1 / (1 + 0.07 * math.log(8))),
    ],
)
def test_transformers_scales_rope_as_the_released_code_does(mscale, all_dim, cosines):
    rope = Rope(factor=8, original_max_position_embeddings=128, mscale=mscale, mscale_all_dim=all_dim)
    raw = to_hf_config(dataclasses.replace(models.tiny(), rope=rope))
    module = DeepseekV2RotaryEmbedding(transformers.DeepseekV2Config(**raw))
    turned = module(torch.zeros(1), torch.zeros(1, 1))
    np.testing.assert_allclose(abs(turned).numpy(), cosines, rtol=1e-6)


def test_a_factor_of_one_is_plain_rope_to_transformers():
    raw = to_hf_config(models.nano())
    module = DeepseekV2RotaryEmbedding(transformers.DeepseekV2Config(**raw))
    assert module.attention_scaling == 1.0
    plain = 10_000.0 ** -(np.arange(0, 32, 2, dtype=np.float64) / 32)
    np.testing.assert_allclose(module.inv_freq.numpy(), plain, rtol=2e-7)


@pytest.mark.parametrize(
    ("attention", "moe", "told"),
    [
        ({}, {"router": "gshard"}, "router gshard"),
        ({"v_head_dim": 12}, {"n_routed_experts": 0}, "v_head_dim"),
        ({}, {}, "kind gqa with experts"),
    ],
)
def test_models_without_a_hugging_face_architecture_are_refused(attention, moe, told):
    gqa = dataclasses.replace(models.dense_67b().attention, **attention)
    model = dataclasses.replace(models.v2_lite(), attention=gqa)
    with pytest.raises(ValueError, match=told):
        to_hf_config(dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe)))
