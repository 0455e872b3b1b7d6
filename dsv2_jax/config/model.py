"""The network's settings: attention, RoPE, experts and sizes.

Fields carry the names of the released checkpoints' `config.json`. Symbols in comments are the paper's
(arXiv:2405.04434).
"""

import dataclasses
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Which attention, and its sizes. `gqa` with as many KV heads as heads is MHA; with one KV head it is MQA."""

    kind: Literal["mla", "gqa"] = "mla"
    num_attention_heads: int = 128  # n_h
    num_key_value_heads: int = 0  # n_g, of gqa only
    q_lora_rank: int = 1536  # d_c', query compression; 0: queries are not compressed
    kv_lora_rank: int = 512  # d_c, key-value compression: what the cache keeps
    qk_nope_head_dim: int = 128  # part of a head's query and key without position; 0 with gqa
    qk_rope_head_dim: int = 64  # d_h^R, the part that RoPE turns; the whole head with gqa
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "qk_rope_head_dim", "v_head_dim"):
            check(getattr(self, name) > 0, f"attention.{name} must be positive, not {getattr(self, name)}")
        check(self.qk_rope_head_dim % 2 == 0, f"attention.qk_rope_head_dim must be even, not {self.qk_rope_head_dim}")
        if self.kind == "mla":
            check(self.kv_lora_rank > 0, "attention.kv_lora_rank must be positive with kind mla")
            check(self.q_lora_rank >= 0, "attention.q_lora_rank must not be negative (0: no query compression)")
            check(self.qk_nope_head_dim > 0, "attention.qk_nope_head_dim must be positive with kind mla")
            check(
                self.num_key_value_heads == 0, "attention.num_key_value_heads belongs to kind gqa; leave it 0 with mla"
            )
        else:
            check(
                self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
                f"attention.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"attention.num_key_value_heads ({self.num_key_value_heads})",
            )
            check(
                self.qk_nope_head_dim == self.kv_lora_rank == self.q_lora_rank == 0,
                "attention: with kind gqa the whole head is turned and nothing is compressed; "
                "qk_nope_head_dim, kv_lora_rank and q_lora_rank must be 0",
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """RoPE with YaRN (section 3.1.4). A factor of 1 is plain RoPE: the same formula, nothing is stretched."""

    theta: float = 10_000.0
    kind: Literal["yarn", "linear"] = "yarn"  # linear: all positions divided by the factor, for comparison
    factor: float = 1.0  # s
    original_max_position_embeddings: int = 4096
    beta_slow: float = 1.0  # alpha: dimensions turning less often than this over the original length are stretched
    beta_fast: float = 32.0  # beta: those turning more often are left alone
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        check(self.theta > 1, f"rope.theta must be above 1, not {self.theta}")
        check(self.factor >= 1, f"rope.factor must be at least 1, not {self.factor}")
        check(self.beta_slow < self.beta_fast, "rope.beta_slow must be below rope.beta_fast")
        check(self.original_max_position_embeddings > 0, "rope.original_max_position_embeddings must be positive")
        check(self.mscale >= 0 and self.mscale_all_dim >= 0, "rope.mscale and rope.mscale_all_dim must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """DeepSeekMoE (section 2.2). No routed experts: every layer has a dense FFN."""

    n_routed_experts: int = 160  # N_r
    num_experts_per_tok: int = 6  # K
    n_shared_experts: int = 2
    moe_intermediate_size: int = 1536
    n_group: int = 8  # D: groups of device-limited routing
    topk_group: int = 3  # M: groups a token may go to
    routed_scaling_factor: float = 16.0
    router: Literal["deepseek", "gshard"] = "deepseek"  # gshard: gates normalised over the top-k, loss on first choices
    expert_balance: float = 0.003  # alpha_1
    device_balance: float = 0.05  # alpha_2
    communication_balance: float = 0.02  # alpha_3
    capacity_factor: float = 1.0  # a group's budget in training over the average; 0: nothing is dropped
    exempt_fraction: float = 0.1  # share of sequences that are never dropped
    budget_sequences: int = 0  # sequences that share a group's budget; 0: all of a micro-batch

    def __post_init__(self) -> None:
        if self.n_routed_experts == 0:
            return
        e, g = self.n_routed_experts, self.n_group
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            check(getattr(self, name) > 0, f"moe.{name} must be positive, not {getattr(self, name)}")
        check(e % g == 0, f"moe.n_routed_experts ({e}) must divide into moe.n_group ({g}) equal groups")
        check(self.topk_group <= g, f"moe.topk_group ({self.topk_group}) cannot exceed moe.n_group ({g})")
        reachable = self.topk_group * (e // g)
        check(
            self.num_experts_per_tok <= reachable,
            f"moe.num_experts_per_tok ({self.num_experts_per_tok}) does not fit in the {reachable} experts of the "
            f"{self.topk_group} groups kept",
        )
        check(0 <= self.exempt_fraction <= 1, f"moe.exempt_fraction must lie in 0 to 1, not {self.exempt_fraction}")
        check(self.capacity_factor >= 0, f"moe.capacity_factor must not be negative, not {self.capacity_factor}")
        check(self.budget_sequences >= 0, f"moe.budget_sequences must not be negative, not {self.budget_sequences}")
        check(
            min(self.expert_balance, self.device_balance, self.communication_balance, self.n_shared_experts) >= 0,
            "moe: balance factors and n_shared_experts must not be negative",
        )

    def budget(self, tokens: int) -> int:
        """Token-expert pairs that a group may compute of so many tokens in training: the average times the factor."""
        return int(self.capacity_factor * tokens * self.num_experts_per_tok / self.n_group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network's sizes."""

    vocab_size: int = 102_400
    hidden_size: int = 5120  # d
    num_hidden_layers: int = 60
    first_k_dense_replace: int = 1  # layers before the first MoE layer
    intermediate_size: int = 12_288  # of the dense layers' FFN
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    head: Literal["tokens", "score"] = "tokens"  # score: one number for a text, of a reward model
    attention: Attention = Attention()
    rope: Rope = Rope()
    moe: Moe = Moe()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            check(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        check(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"model.first_k_dense_replace ({self.first_k_dense_replace}) must lie in 0 to "
            f"model.num_hidden_layers ({self.num_hidden_layers})",
        )
        check(self.dense_layers == 0 or self.intermediate_size > 0, "model.intermediate_size must be positive")
        longest = self.rope.original_max_position_embeddings * self.rope.factor
        check(
            self.max_position_embeddings <= longest,
            f"model.max_position_embeddings ({self.max_position_embeddings}) exceeds what RoPE reaches: rope.factor x "
            f"rope.original_max_position_embeddings = {longest:g}",
        )

    @property
    def dense_layers(self) -> int:
        """Number of layers with a dense FFN: the first ones, or all without routed experts."""
        return self.first_k_dense_replace if self.moe.n_routed_experts else self.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts; they follow the dense ones."""
        return self.num_hidden_layers - self.dense_layers

    @property
    def cache_elements(self) -> int:
        """Numbers that the cache keeps for one token over all layers (Table 1)."""
        a = self.attention
        if a.kind == "mla":
            return self.num_hidden_layers * (a.kv_lora_rank + a.qk_rope_head_dim)
        return self.num_hidden_layers * a.num_key_value_heads * (a.qk_head_dim + a.v_head_dim)
