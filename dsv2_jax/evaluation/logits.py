"""Logits of given token ids in float32, for parity checks against other implementations."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import Compute, check
from dsv2_jax.loading import Loaded
from dsv2_jax.model import transformer


def write(loaded: Loaded, ids_BT: np.ndarray, path: Path) -> None:
    """Saves float32 logits [B, T, vocabulary] of ids [B, T] as .npy, computed in float32, row by row.

    Raises ValueError for ids outside the vocabulary and for rows longer than the model's positions.
    """
    model = loaded.model
    b, t = ids_BT.shape
    check(
        ids_BT.min() >= 0 and ids_BT.max() < model.vocab_size,
        f"token ids must be in 0 to {model.vocab_size - 1}; found {ids_BT.min()} to {ids_BT.max()}",
    )
    check(
        t <= model.max_position_embeddings, f"{t} tokens exceed the model's {model.max_position_embeddings} positions"
    )

    @jax.jit
    def row_logits(params: Any, ids_1T: jax.Array) -> jax.Array:
        batch = {"tokens_BT": ids_1T, "positions_BT": jnp.arange(t)[None], "segments_BT": jnp.ones((1, t), jnp.int32)}
        out = transformer.forward(params, batch, model=model, compute=Compute(dtype="float32", remat="none"))
        return transformer.logits(params, out.hidden_BTD)[0]

    out_BTW = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(b, t, model.vocab_size))
    for row in range(b):
        out_BTW[row] = row_logits(loaded.params, jnp.asarray(ids_BT[row : row + 1], jnp.int32))
    out_BTW.flush()
    print(f"wrote logits [{b}, {t}, {model.vocab_size}] to {path}")
