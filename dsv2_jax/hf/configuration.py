"""Converts `config.json` to our model config and back: DeepSeek-V2's, and Llama's for grouped-query models.

Writes the released style (`rope_theta` and `rope_scaling`), which all readers support. Also reads the style of
transformers 5 (`rope_parameters`). Released configs do not give token dropping and no balance loss but the experts';
these take our defaults.
"""

import math
from typing import Any, NamedTuple

from dsv2_jax.config import Attention, Model, Moe, Rope, check
from dsv2_jax.config.model import RouterName

# Settings that our model supports with one value only.
_FIXED = {
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
}


class HfRouter(NamedTuple):
    """What `config.json` says about a kind of router. methods: topk_method without and with groups."""

    family: str
    model_type: str
    methods: tuple[str, str]
    settings: dict[str, Any]


# The kinds of routers that have an architecture; dense models have that of deepseek.
_ROUTERS: dict[RouterName, HfRouter] = {
    "deepseek": HfRouter(
        "DeepseekV2",
        "deepseek_v2",
        ("greedy", "group_limited_greedy"),
        {"norm_topk_prob": False, "scoring_func": "softmax"},
    ),
}
_KINDS: dict[str, RouterName] = {router.model_type: kind for kind, router in _ROUTERS.items()}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
_MLA = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")


def to_hf_config(
    model: Model, dtype: str = "float32", bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """The `config.json` of this model, for weights of `dtype`. bos, eos, pad: token ids (None: no such token).

    pad is for reward models: transformers takes the score at the last token that is not padding. Raises ValueError for
    a model without a Hugging Face architecture.
    """
    check(
        not model.moe_layers or model.moe.router in _ROUTERS,
        f"moe.router {model.moe.router} has no Hugging Face architecture; only router {', '.join(_ROUTERS)} can be "
        "exported",
    )
    common = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        **{name: getattr(model, name) for name in _SIZES},
        "initializer_range": model.initializer_range,
        "num_attention_heads": model.attention.num_attention_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": _as_integer(model.rope.theta),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    common |= {"pad_token_id": pad} if model.head == "score" else {}
    return common | (_deepseek(model) if model.attention.kind == "mla" else _llama(model))


def from_hf_config(raw: dict[str, Any]) -> Model:
    """The model config of a `config.json`.

    Raises ValueError for an unknown architecture, a missing field, or a setting that our model does not support.
    """
    kind = raw.get("model_type")
    check(
        kind in _KINDS or kind == "llama",
        f"config.json: model_type is {kind!r}; supported: {', '.join(_KINDS)}, llama",
    )
    fixed = _FIXED | (_ROUTERS[_KINDS[kind]].settings if kind in _KINDS else {})
    for name, only in fixed.items():
        check(
            raw.get(name) in (only, None),
            f"config.json: {name} is {raw.get(name)!r}, which is not supported; it must be {only!r}",
        )
    _require(raw, (*_SIZES, "num_attention_heads", "rms_norm_eps"), "config.json")
    attention, moe = (_read_mla(raw), _read_moe(raw)) if kind in _KINDS else (_read_gqa(raw), Moe(n_routed_experts=0))
    return Model(
        **{name: raw[name] for name in _SIZES},
        first_k_dense_replace=raw.get("first_k_dense_replace", 0) if moe.n_routed_experts else 0,
        rms_norm_eps=float(raw["rms_norm_eps"]),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        head="score" if any(name.endswith(_SCORE) for name in raw.get("architectures") or ()) else "tokens",
        attention=attention,
        rope=_read_rope(raw),
        moe=moe,
    )


_SCORE = "ForSequenceClassification"  # class name of reward models in transformers


def _deepseek(model: Model) -> dict[str, Any]:
    a, m = model.attention, model.moe
    router = _ROUTERS[m.router if model.moe_layers else "deepseek"]
    experts = {
        "aux_loss_alpha": m.expert_balance,
        "ep_size": 1,
        "moe_layer_freq": 1,
        **{name: getattr(m, name) for name in _MOE},
        "n_group": m.n_group,
        "n_shared_experts": m.n_shared_experts or None,
        "routed_scaling_factor": m.routed_scaling_factor,
        "seq_aux": True,
        "topk_group": m.topk_group,
        "topk_method": router.methods[m.n_group > 1],
        **router.settings,
    }
    return {
        **_architecture(router.family, model),
        "model_type": router.model_type,
        "first_k_dense_replace": model.dense_layers,
        **{name: getattr(a, name) for name in _MLA},
        "num_key_value_heads": a.num_attention_heads,
        "q_lora_rank": a.q_lora_rank or None,
        # Also with a factor of 1, which is plain RoPE: some readers need the entry.
        "rope_scaling": _yarn(model.rope, model.rope.mscale, model.rope.mscale_all_dim),
        **(experts if model.moe_layers else {"n_routed_experts": 0}),
    }


def _architecture(family: str, model: Model) -> dict[str, Any]:
    if model.head == "tokens":
        return {"architectures": [f"{family}ForCausalLM"]}
    return {"architectures": [f"{family}{_SCORE}"], "id2label": {"0": "score"}, "label2id": {"score": 0}}


def _llama(model: Model) -> dict[str, Any]:
    a, rope = model.attention, model.rope
    check(
        model.moe_layers == 0,
        "attention.kind gqa with experts has no Hugging Face architecture and cannot be exported",
    )
    check(
        a.v_head_dim == a.qk_rope_head_dim,
        f"Llama has values of the width of its keys: attention.v_head_dim ({a.v_head_dim}) must equal "
        f"attention.qk_rope_head_dim ({a.qk_rope_head_dim}) for an export",
    )
    return {
        **_architecture("Llama", model),
        "model_type": "llama",
        "head_dim": a.qk_rope_head_dim,
        "mlp_bias": False,
        "num_key_value_heads": a.num_key_value_heads,
        # Llama does not scale the softmax, so queries and keys must contribute all of mscale squared.
        "rope_scaling": _yarn(rope, rope.mscale, 0.0) if rope.factor > 1 else None,
    }


def _yarn(rope: Rope, mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    check(rope.kind == "yarn", "rope.kind linear cannot be exported: the released architecture has YaRN only")
    scaling = {
        "beta_fast": _as_integer(rope.beta_fast),
        "beta_slow": _as_integer(rope.beta_slow),
        "factor": _as_integer(rope.factor),
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "type": "yarn",
    }
    if not (mscale and mscale_all_dim):  # transformers' own formula differs from the released one here
        scaling["attention_factor"] = _attention_factor(rope.factor, mscale, mscale_all_dim)
    return scaling


def _attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The factor of RoPE's cosines and sines in the released code."""
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)


def _read_mla(raw: dict[str, Any]) -> Attention:
    _require(raw, _MLA, "config.json")
    heads = raw["num_attention_heads"]
    check(
        raw.get("num_key_value_heads") in (heads, None),
        f"config.json: num_key_value_heads is {raw.get('num_key_value_heads')}; with latent attention it must equal "
        f"num_attention_heads ({heads})",
    )
    return Attention(q_lora_rank=raw.get("q_lora_rank") or 0, **{name: raw[name] for name in _MLA})


def _read_gqa(raw: dict[str, Any]) -> Attention:
    heads = raw["num_attention_heads"]
    width = raw.get("head_dim") or raw["hidden_size"] // heads
    return Attention(
        kind="gqa",
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        q_lora_rank=0,
        kv_lora_rank=0,
        qk_nope_head_dim=0,
        qk_rope_head_dim=width,
        v_head_dim=width,
    )


def _read_moe(raw: dict[str, Any]) -> Moe:
    if not raw.get("n_routed_experts") or raw.get("first_k_dense_replace", 0) >= raw["num_hidden_layers"]:
        return Moe(n_routed_experts=0)
    _require(raw, (*_MOE, "routed_scaling_factor"), "config.json")
    kind = _KINDS[raw["model_type"]]
    methods = _ROUTERS[kind].methods
    method = raw.get("topk_method", methods[0])
    check(
        method in methods,
        f"config.json: topk_method is {method!r}; supported: {', '.join(dict.fromkeys(methods))}",
    )
    limited = method == methods[1]
    _require(raw, ("n_group", "topk_group") if limited else (), "config.json")
    return Moe(
        **{name: raw[name] for name in _MOE},
        router=kind,
        routed_scaling_factor=float(raw["routed_scaling_factor"]),
        n_shared_experts=raw.get("n_shared_experts") or 0,
        n_group=raw["n_group"] if limited else 1,
        topk_group=raw["topk_group"] if limited else 1,
        expert_balance=float(raw.get("aux_loss_alpha", Moe.expert_balance)),
    )


def _read_rope(raw: dict[str, Any]) -> Rope:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    where = "config.json: rope_parameters" if raw.get("rope_parameters") else "config.json: rope_scaling"
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", Rope.theta)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta, original_max_position_embeddings=raw["max_position_embeddings"])
    check(kind == "yarn", f"{where} has the type {kind!r}; supported: yarn, default")
    _require(scaling, ("factor", "original_max_position_embeddings"), where)
    rope = Rope(
        theta=theta,
        factor=float(scaling["factor"]),
        original_max_position_embeddings=scaling["original_max_position_embeddings"],
        beta_slow=float(scaling.get("beta_slow", 1)),
        beta_fast=float(scaling.get("beta_fast", 32)),
        mscale=float(scaling.get("mscale", 1.0)),  # defaults of the released code
        mscale_all_dim=float(scaling.get("mscale_all_dim", 0.0)),
    )
    check(
        raw["model_type"] in _KINDS or not rope.mscale_all_dim,
        f"{where}.mscale_all_dim is {rope.mscale_all_dim}; it must be 0 or absent, "
        "because Llama does not scale the softmax",
    )
    expected = _attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
    given = scaling.get("attention_factor")
    check(
        given is None or math.isclose(given, expected, rel_tol=1e-6),
        f"{where}.attention_factor is {given}, but its mscale and mscale_all_dim give {expected}",
    )
    check(scaling.get("truncate", True), f"{where}.truncate is false, which is not supported; it must be true")
    return rope


def _require(raw: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises ValueError unless all these fields are present and numbers."""
    missing = [name for name in names if raw.get(name) is None]
    check(not missing, f"{where} lacks {', '.join(missing)}")
    for name in names:
        number = isinstance(raw[name], (int, float)) and not isinstance(raw[name], bool)
        check(number, f"{where}: {name} must be a number, not {raw[name]!r}")


def _as_integer(value: float) -> int | float:
    """An integral value as int, as released configs write it."""
    return int(value) if value == int(value) else value
