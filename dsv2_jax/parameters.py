"""Names and shapes of the parameters: a table that modules, counts, sharding and files share.

A name ends in the letters of its dimensions: `w_uk_CHN` has the dimensions latent, heads and nope width. The letters:

    B batch       T time (query)   S source (key)   L layers
    D model       H heads          J KV heads (gqa) W vocabulary
    N nope width  R rope width     V value width    C kv latent    Q query latent
    E experts     K active experts F expert width   X shared experts' width   I dense FFN width
    G groups of experts
"""

import math

from dsv2_jax.config import Model
from dsv2_jax.config.model import RouterName

LOGICAL = {
    "B": "batch",
    "T": "time",
    "S": "source",
    "L": "layers",
    "D": "model",
    "H": "heads",
    "J": "kv_heads",
    "W": "vocabulary",
    "N": "nope",
    "R": "rope",
    "V": "value",
    "C": "kv_latent",
    "Q": "query_latent",
    "E": "experts",
    "K": "active_experts",
    "F": "expert_width",
    "X": "shared_width",
    "I": "dense_width",
    "G": "groups",
}


# Beginnings of names. The router runs in float32 (section 2.2), and so does a reward model's score. Embedding rows are
# cast when read. A parameter with a constant initial value has no weight decay; others are drawn (section 3.1.2).
KEPT_FLOAT32 = ("norm", "w_router", "w_embed", "w_score")
CONSTANT = {"norm": 1.0}

# Parameters of each kind of router.
ROUTERS: dict[RouterName, list[str]] = {"deepseek": ["w_router_DE"], "gshard": ["w_router_DE"]}


def letters(name: str) -> str:
    """The dimension letters at the end of a name: `CHN` for `w_uk_CHN`."""
    return name.rsplit("_", 1)[-1]


def dims(name: str) -> tuple[str, ...]:
    """The logical dimension names of a parameter or activation. Raises KeyError for an unknown letter."""
    return tuple(LOGICAL[letter] for letter in letters(name))


def per_expert(name: str) -> bool:
    """Whether a parameter holds a matrix of each routed expert, as `w_up_EDF` does."""
    return letters(name)[0] == "E" and len(letters(name)) > 1


def initial(name: str) -> float | None:
    """The value that a parameter has everywhere at first; None if it is drawn."""
    return next((value for prefix, value in CONSTANT.items() if name.startswith(prefix)), None)


def shape(name: str, model: Model) -> tuple[int, ...]:
    """The shape of a parameter of one layer, from the letters of its name."""
    a, m = model.attention, model.moe
    sizes = {
        "D": model.hidden_size,
        "H": a.num_attention_heads,
        "J": a.num_key_value_heads,
        "W": model.vocab_size,
        "N": a.qk_nope_head_dim,
        "R": a.qk_rope_head_dim,
        "V": a.v_head_dim,
        "C": a.kv_lora_rank,
        "Q": a.q_lora_rank,
        "E": m.n_routed_experts,
        "F": m.moe_intermediate_size,
        "X": m.n_shared_experts * m.moe_intermediate_size,
        "I": model.intermediate_size,
    }
    return tuple(sizes[letter] for letter in letters(name))


def attention_names(model: Model) -> list[str]:
    """The parameters of attention, in the paper's symbols (section 2.1, App. C)."""
    a = model.attention
    if a.kind == "gqa":
        return ["w_q_DHR", "w_k_DJR", "w_v_DJV", "w_o_HVD"]
    query = ["w_dq_DQ", "norm_q_Q", "w_uq_QHN", "w_qr_QHR"] if a.q_lora_rank else ["w_uq_DHN", "w_qr_DHR"]
    return [*query, "w_dkv_DC", "w_kr_DR", "norm_kv_C", "w_uk_CHN", "w_uv_CHV", "w_o_HVD"]


def ffn_names(model: Model, sparse: bool) -> list[str]:
    """The parameters of the FFN: of an MoE layer if `sparse`, else of a dense layer."""
    if not sparse:
        return ["w_gate_DI", "w_up_DI", "w_down_ID"]
    shared = ["w_gate_DX", "w_up_DX", "w_down_XD"] if model.moe.n_shared_experts else []
    return [*ROUTERS[model.moe.router], "w_gate_EDF", "w_up_EDF", "w_down_EFD", *shared]


def layer_names(model: Model, sparse: bool) -> list[str]:
    """All parameters of one layer."""
    return ["norm_attention_D", *attention_names(model), "norm_ffn_D", *ffn_names(model, sparse)]


def head_names(model: Model) -> list[str]:
    """The parameters after the last layer: a norm, then the output head (logits, or one score)."""
    return ["norm_D", "w_head_DW" if model.head == "tokens" else "w_score_D"]


def tree(model: Model) -> dict:
    """Shapes of the parameter tree: {"embed": ..., "dense": {name: (L, ...)}, "moe": {...}, "head": ...}.

    The layers of one kind are stacked along a leading axis L. A kind without layers has no entry.
    """
    shapes: dict = {"embed": {"w_embed_WD": shape("w_embed_WD", model)}}
    for kind, count in (("dense", model.dense_layers), ("moe", model.moe_layers)):
        if count:
            shapes[kind] = {name: (count, *shape(name, model)) for name in layer_names(model, kind == "moe")}
    shapes["head"] = {name: shape(name, model) for name in head_names(model)}
    return shapes


def count(model: Model) -> int:
    """Exact number of parameters."""
    return sum(math.prod(s) for part in tree(model).values() for s in part.values())


def count_activated(model: Model) -> int:
    """Exact number of parameters activated per token.

    Leaves out the routed experts that the token does not use, and the embedding, because the token reads only one row
    of it. By this convention the released models have 21B and 2.4B.
    """
    m = model.moe
    total = count(model) - model.vocab_size * model.hidden_size
    idle = m.n_routed_experts - m.num_experts_per_tok if model.moe_layers else 0
    return total - model.moe_layers * idle * 3 * model.hidden_size * m.moe_intermediate_size
