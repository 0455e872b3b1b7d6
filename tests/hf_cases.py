"""What the tests of Hugging Face folders share: small models, runs made of them, and folders read by other means."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from configs import models
from dsv2_jax import parameters
from dsv2_jax.config import Attention, Batch, Config, Model, Moe
from dsv2_jax.data import tokenizer
from dsv2_jax.training import checkpoint

GOLDEN = Path(__file__).parent / "golden"

# config.json of DeepSeek-V2 as released.
RELEASED_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def lite() -> Model:
    """No query compression, no groups, no YaRN."""
    return dataclasses.replace(
        models.tiny(),
        attention=dataclasses.replace(models.tiny().attention, q_lora_rank=0),
        rope=dataclasses.replace(models.tiny().rope, factor=1.0, original_max_position_embeddings=1024),
        moe=dataclasses.replace(models.tiny().moe, n_group=1, topk_group=1),
    )


def dense() -> Model:
    """Latent attention and no experts."""
    return dataclasses.replace(models.tiny(), first_k_dense_replace=0, moe=Moe(n_routed_experts=0))


def gqa() -> Model:
    """Grouped queries and no experts, with YaRN."""
    attention = Attention(
        kind="gqa",
        num_attention_heads=4,
        num_key_value_heads=2,
        q_lora_rank=0,
        kv_lora_rank=0,
        qk_nope_head_dim=0,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return dataclasses.replace(dense(), attention=attention)


MODELS = {"v2": models.tiny, "lite": lite, "dense": dense, "gqa": gqa}


def random_params(model: Model) -> dict:
    """Normal numbers that keep activations near 1; norms near 1."""
    rng = np.random.default_rng(0)

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        return 1 + 0.1 * values if name.startswith("norm") else 0.2 * values

    tree = parameters.tree(model)
    return {part: {name: leaf(name, shape) for name, shape in names.items()} for part, names in tree.items()}


def make_run(folder: Path, model: Model) -> dict:
    """A run's folder as training leaves it, and its parameters."""
    params = random_params(model)
    config = Config(workdir=folder, model=model, batch=Batch(size=4, length=32), tokens=10**6)
    checkpoint.save_params(folder, config, jax.tree.map(jax.numpy.asarray, params), step=7)
    return params


def give_tokenizer(run: Path) -> None:
    """A tokenizer of at most 512 ids, as a run's folder has it."""
    text = Path(transformers.__file__).read_text() + (Path(__file__).parent.parent / "pyproject.toml").read_text()
    tokenizer.train([text], 512, run / "tokenizer")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
