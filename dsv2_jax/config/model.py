"""The network's settings: attention, RoPE, experts and sizes.

Fields have the names of the released checkpoints' `config.json`. Symbols in comments are the paper's
(arXiv:2405.04434).
"""

import dataclasses
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """The kind of attention and its sizes. `gqa` with as many KV heads as heads is MHA; with one KV head it is MQA."""

    kind: Literal["mla", "gqa"] = "mla"
    num_attention_heads: int = 128  # n_h
    num_key_value_heads: int = 0  # n_g, gqa only
    q_lora_rank: int = 1536  # d_c', width of the compressed query; 0: no query compression
    kv_lora_rank: int = 512  # d_c, width of the compressed keys and values, which the cache stores
    qk_nope_head_dim: int = 128  # width without RoPE of a head's query and key; 0 with gqa
    qk_rope_head_dim: int = 64  # d_h^R, width that RoPE rotates; the full head with gqa
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "qk_rope_head_dim", "v_head_dim"):
            check(getattr(self, name) > 0, f"attention.{name} must be positive, not {getattr(self, name)}")
        check(self.qk_rope_head_dim % 2 == 0, f"attention.qk_rope_head_dim must be even, not {self.qk_rope_head_dim}")
        if self.kind == "mla":
            check(self.kv_lora_rank > 0, "attention.kv_lora_rank must be positive with kind mla")
            check(self.q_lora_rank >= 0, "attention.q_lora_rank must be at least 0 (0: no query compression)")
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
                "attention: kind gqa rotates the full head, without compression: qk_nope_head_dim, kv_lora_rank and "
                "q_lora_rank must be 0",
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """RoPE with YaRN (section 3.1.4). With a factor of 1 the formula gives plain RoPE."""

    theta: float = 10_000.0
    kind: Literal["yarn", "linear"] = "yarn"  # linear: divides all positions by the factor (baseline)
    factor: float = 1.0  # s
    original_max_position_embeddings: int = 4096
    # alpha: pairs of dimensions with fewer rotations over the original length have their frequency divided by `factor`
    beta_slow: float = 1.0
    beta_fast: float = 32.0  # beta: pairs with more rotations keep their frequency
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        check(self.theta > 1, f"rope.theta must be above 1, not {self.theta}")
        check(self.factor >= 1, f"rope.factor must be at least 1, not {self.factor}")
        check(self.beta_slow < self.beta_fast, "rope.beta_slow must be below rope.beta_fast")
        check(self.original_max_position_embeddings > 0, "rope.original_max_position_embeddings must be positive")
        check(self.mscale >= 0 and self.mscale_all_dim >= 0, "rope.mscale and rope.mscale_all_dim must be at least 0")


# gshard: gates are normalised over the top k, and the balance loss counts first choices
RouterName = Literal["deepseek", "gshard"]

_BALANCE = "balance"


def _balance(factor: float) -> float:
    """A field that is the factor of a balance loss, which model/router.py computes under the field's name."""
    return dataclasses.field(default=factor, metadata={_BALANCE: True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """DeepSeekMoE (section 2.2). With 0 routed experts every layer has a dense FFN."""

    n_routed_experts: int = 160  # N_r
    num_experts_per_tok: int = 6  # K
    n_shared_experts: int = 2
    moe_intermediate_size: int = 1536
    n_group: int = 8  # D: groups of device-limited routing
    topk_group: int = 3  # M: groups per token
    routed_scaling_factor: float = 16.0
    router: RouterName = "deepseek"
    expert_balance: float = _balance(0.003)  # alpha_1
    device_balance: float = _balance(0.05)  # alpha_2
    communication_balance: float = _balance(0.02)  # alpha_3
    capacity_factor: float = 1.0  # capacity of a group in training, relative to the average load; 0: no token dropping
    exempt_fraction: float = 0.1  # fraction of sequences whose tokens are never dropped
    budget_sequences: int = 0  # sequences that share the capacity of a group; 0: all of a micro-batch

    def __post_init__(self) -> None:
        if self.n_routed_experts == 0:
            return
        e, g = self.n_routed_experts, self.n_group
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            check(getattr(self, name) > 0, f"moe.{name} must be positive, not {getattr(self, name)}")
        check(e % g == 0, f"moe.n_routed_experts ({e}) must be a multiple of moe.n_group ({g})")
        check(self.topk_group <= g, f"moe.topk_group ({self.topk_group}) cannot exceed moe.n_group ({g})")
        reachable = self.topk_group * (e // g)
        check(
            self.num_experts_per_tok <= reachable,
            f"moe.num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {reachable} experts of "
            f"moe.topk_group ({self.topk_group}) groups",
        )
        check(0 <= self.exempt_fraction <= 1, f"moe.exempt_fraction must be from 0 to 1, not {self.exempt_fraction}")
        check(self.capacity_factor >= 0, f"moe.capacity_factor must be at least 0, not {self.capacity_factor}")
        check(self.budget_sequences >= 0, f"moe.budget_sequences must be at least 0, not {self.budget_sequences}")
        check(
            min(self.n_shared_experts, *(getattr(self, name) for name in self.balances())) >= 0,
            "moe: balance factors and n_shared_experts must not be negative",
        )

    @classmethod
    def balances(cls) -> tuple[str, ...]:
        """The names of the factors of balance losses."""
        return tuple(field.name for field in dataclasses.fields(cls) if _BALANCE in field.metadata)

    def budget(self, tokens: int) -> int:
        """Maximum number of token-expert pairs per group in training.

        This is the average load of `tokens` tokens times capacity_factor.
        """
        return int(self.capacity_factor * tokens * self.num_experts_per_tok / self.n_group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of the network."""

    vocab_size: int = 102_400
    hidden_size: int = 5120  # d
    num_hidden_layers: int = 60
    first_k_dense_replace: int = 1  # dense layers before the first MoE layer
    intermediate_size: int = 12_288  # of the FFN in dense layers
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    head: Literal["tokens", "score"] = "tokens"  # score: a reward model, with one number per text
    attention: Attention = Attention()
    rope: Rope = Rope()
    moe: Moe = Moe()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            check(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        check(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"model.first_k_dense_replace ({self.first_k_dense_replace}) must be from 0 to "
            f"model.num_hidden_layers ({self.num_hidden_layers})",
        )
        check(self.dense_layers == 0 or self.intermediate_size > 0, "model.intermediate_size must be positive")
        longest = self.rope.original_max_position_embeddings * self.rope.factor
        check(
            self.max_position_embeddings <= longest,
            f"model.max_position_embeddings ({self.max_position_embeddings}) exceeds the range of RoPE: rope.factor x "
            f"rope.original_max_position_embeddings = {longest:g}",
        )

    @property
    def dense_layers(self) -> int:
        """Number of layers with a dense FFN: the first ones, or all layers if there are no routed experts."""
        return self.first_k_dense_replace if self.moe.n_routed_experts else self.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts, which follow the dense layers."""
        return self.num_hidden_layers - self.dense_layers

    @property
    def cache_elements(self) -> int:
        """Number of cached elements per token, over all layers (Table 1)."""
        a = self.attention
        if a.kind == "mla":
            return self.num_hidden_layers * (a.kv_lora_rank + a.qk_rope_head_dim)
        return self.num_hidden_layers * a.num_key_value_heads * (a.qk_head_dim + a.v_head_dim)
