"""The sizes of the models: those of the paper, its dense baseline, and two small ones for laptops and tests."""

from dsv2_jax.config import Attention, Model, Moe, Rope


def v2() -> Model:
    """DeepSeek-V2: 236B parameters, 21B activated (section 3.1.2)."""
    return Model()


def v2_lite() -> Model:
    """DeepSeek-V2-Lite: 15.7B parameters, 2.4B activated (App. B)."""
    return Model(
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10_944,
        attention=Attention(num_attention_heads=16, q_lora_rank=0),
        moe=Moe(
            n_routed_experts=64,
            moe_intermediate_size=1408,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            expert_balance=0.001,
            device_balance=0.0,
            communication_balance=0.0,
            capacity_factor=0.0,
        ),
    )


def dense_67b() -> Model:
    """DeepSeek 67B, the paper's dense baseline with grouped-query attention."""
    return Model(
        hidden_size=8192,
        num_hidden_layers=95,
        first_k_dense_replace=0,
        intermediate_size=22_016,
        attention=Attention(
            kind="gqa",
            num_attention_heads=64,
            num_key_value_heads=8,
            q_lora_rank=0,
            kv_lora_rank=0,
            qk_nope_head_dim=0,
            qk_rope_head_dim=128,
        ),
        moe=Moe(n_routed_experts=0),
    )


def nano() -> Model:
    """A small DeepSeek-V2 with every mechanism, which a laptop trains in minutes."""
    return Model(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=704,
        max_position_embeddings=512,
        initializer_range=0.02,
        attention=Attention(
            num_attention_heads=4,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        ),
        rope=Rope(original_max_position_embeddings=512),
        moe=Moe(
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=2,
            moe_intermediate_size=128,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=4.0,
        ),
    )


def tiny() -> Model:
    """The smallest model with every mechanism, for tests."""
    return Model(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=48,
        max_position_embeddings=1024,
        initializer_range=0.05,
        attention=Attention(
            num_attention_heads=4,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
        ),
        rope=Rope(factor=8, original_max_position_embeddings=128),
        moe=Moe(
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=2,
            moe_intermediate_size=16,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=4.0,
        ),
    )
