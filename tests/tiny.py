"""Tiny models, their parameters, batches, runs on disk and training steps: what tests build, built in one place.

Imports neither torch nor transformers, so that the tests that use it run where these are not installed.
"""

import dataclasses
import inspect
import json
from pathlib import Path

import jax
import numpy as np

from configs import models
from dsv2_jax import parameters
from dsv2_jax.config import AXES, Attention, Batch, Config, Model, Moe
from dsv2_jax.data import tokenizer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.training import checkpoint
from dsv2_jax.training.loss import loss as language_loss
from dsv2_jax.training.step import create, state_specs, train_step

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RELEASED_V2 = json.loads((GOLDEN / "released_v2.json").read_text())


def lite() -> Model:
    """No query compression, no groups, no YaRN."""
    return dataclasses.replace(
        models.tiny(),
        attention=dataclasses.replace(models.tiny().attention, q_lora_rank=0),
        rope=dataclasses.replace(models.tiny().rope, factor=1.0, original_max_position_embeddings=1024),
        moe=dataclasses.replace(models.tiny().moe, n_group=1, topk_group=1),
    )


# Two KV heads; keys and values differ in width.
GQA = Attention(
    kind="gqa",
    num_attention_heads=4,
    num_key_value_heads=2,
    q_lora_rank=0,
    kv_lora_rank=0,
    qk_nope_head_dim=0,
    qk_rope_head_dim=16,
    v_head_dim=12,
)


def dense() -> Model:
    """Latent attention and no experts."""
    return dataclasses.replace(models.tiny(), first_k_dense_replace=0, moe=Moe(n_routed_experts=0))


def gqa() -> Model:
    """Grouped-query attention and no experts, with YaRN."""
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


def eight_heads() -> Attention:
    """Latent attention whose heads eight devices divide."""
    return Attention(
        num_attention_heads=8, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12
    )


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
    """Writes a run's folder as training leaves it; returns its parameters."""
    params = random_params(model)
    config = Config(workdir=folder, model=model, batch=Batch(size=4, length=32), tokens=10**6)
    checkpoint.save_params(folder, config, jax.tree.map(jax.numpy.asarray, params), step=7)
    return params


def give_tokenizer(run: Path) -> None:
    """Trains a tokenizer of at most 512 ids into a run's folder."""
    text = inspect.getsource(json.decoder) + (ROOT / "pyproject.toml").read_text()
    tokenizer.train([text], 512, run / "tokenizer")


def rows_of(tokens_BT: np.ndarray | jax.Array) -> dict[str, jax.Array]:
    """A batch for a forward pass: every row is one document."""
    tokens_BT = jax.numpy.asarray(tokens_BT, "int32")
    positions_BT = jax.numpy.broadcast_to(jax.numpy.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "segments_BT": jax.numpy.ones_like(tokens_BT)}


def training_rows(ids_BT: np.ndarray) -> dict[str, jax.Array]:
    """A batch that learns the next id of every row, all of weight 1."""
    inputs_BT, targets_BT = ids_BT[:, :-1], jax.numpy.asarray(ids_BT[:, 1:], "int32")
    weights_BT = jax.numpy.ones(targets_BT.shape)
    return rows_of(inputs_BT) | {
        "targets_BT": targets_BT, "weights_BT": weights_BT, "bytes_BT": jax.numpy.ones_like(targets_BT)
    }  # fmt: skip


def batch(
    model: Model, rows: int, length: int, micro_batches: int = 1, second: int = 0, padding: int = 0
) -> dict[str, np.ndarray]:
    """A training batch of random tokens, arrays [micro-batches, rows / micro-batches, length].

    second: the position at which every other row starts its second document. padding: the position from which every
    fourth row is padding. 0: rows have one document, no padding.
    """
    rng = np.random.default_rng(0)
    segments_BT = np.ones((rows, length), np.int32)
    if second:
        segments_BT[::2, second:] = 2
    if padding:
        segments_BT[1::4, padding:] = 0
    positions_BT = np.arange(length, dtype=np.int32) - np.where(segments_BT == 2, second, 0).astype(np.int32)
    tokens_BT = rng.integers(0, model.vocab_size, (2, rows, length)).astype(np.int32)
    leaves = {
        "tokens_BT": tokens_BT[0],
        "targets_BT": tokens_BT[1],
        "positions_BT": positions_BT,
        "segments_BT": segments_BT,
        "bytes_BT": rng.integers(0, 5, (rows, length)).astype(np.int32),
        "weights_BT": (segments_BT > 0).astype(np.float32),
    }
    return {name: leaf.reshape(micro_batches, -1, length) for name, leaf in leaves.items()}


def train(
    config: Config, params: dict, data: dict[str, np.ndarray], steps: int = 1, lr: float = 1e-3, loss=language_loss
) -> tuple[list[dict], dict, dict]:
    """Trains on one batch, on the first devices, in the layout of `config.mesh`.

    Returns, on the host: the metrics of every step, the parameters after the last one, and the gradients of the first
    as AdamW's first moments, that is clipped and times 0.1.
    """
    mesh = device_mesh.make(config.mesh, jax.devices()[: config.mesh.size(*AXES)])
    placed = BatchPlacement(mesh, config.mesh, data["weights_BT"].shape[1])(data)
    state = jax.device_put(create(params, config), sharding.on(mesh, state_specs(config)))
    history, first = [], None
    for _ in range(steps):
        state, metrics = train_step(state, placed, lr, config=config, loss=loss, mesh=mesh)
        history.append(jax.device_get(metrics))
        first = first or jax.device_get(state.optimizer[0].mu)
    assert first is not None
    return history, jax.device_get(state.params), first
