"""Reward models as rewards of GRPO (section 4.2): they score full conversations on the policy's devices."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from dsv2_jax import loading
from dsv2_jax.alignment import reward
from dsv2_jax.config import Config, check
from dsv2_jax.data.packing import blank_batch
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.batches import BatchPlacement


class Judge:
    """A reward model that scores conversations. All processes must call it with the same arguments."""

    def __init__(self, folder: Path, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh | None):
        """tokenizer: the policy's.

        Raises ValueError if the folder holds no reward model, or one with another tokenizer, another chat template or
        too few positions.
        """
        loaded = loading.load(folder, mesh)
        check(loaded.model.head == "score", f"{folder} holds no reward model (model.head must be score)")
        theirs = loaded.need_tokenizer()
        check(
            theirs.identity == tokenizer.identity, f"the tokenizer of the reward model in {folder} is not the policy's"
        )
        same = theirs.template.source == tokenizer.template.source
        check(same, f"the chat template of the reward model in {folder} is not the policy's")
        length, positions = config.batch.length, loaded.model.max_position_embeddings
        check(
            length <= positions,
            f"the reward model in {folder} has {positions} positions, but conversations have up to {length} tokens "
            "(batch.length)",
        )
        self._config, self._params, self._mesh = dataclasses.replace(config, model=loaded.model), loaded.params, mesh
        self._rows = config.batch.micro_size or config.batch.size
        self._place = BatchPlacement(mesh, config.mesh, self._rows)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """The score at the last id of each sequence of at most `batch.length` ids, float32 [N]."""
        count, length = len(sequences), self._config.batch.length
        rows = blank_batch(-(-count // self._rows) * self._rows, length)
        for row, ids in enumerate(sequences):
            rows["tokens_BT"][row, : len(ids)] = ids
            rows["positions_BT"][row, : len(ids)] = np.arange(len(ids))
            rows["segments_BT"][row, : len(ids)] = 1
        names = ("tokens_BT", "positions_BT", "segments_BT")
        found = []
        for start in range(0, count, self._rows):
            mine = np.arange(self._rows) if self._place.mine is None else self._place.mine
            batch = self._place({name: rows[name][None, start + mine] for name in names})
            found.append(processes.everywhere(_scores(self._params, batch, config=self._config, mesh=self._mesh))[0])
        last = [len(ids) - 1 for ids in sequences]
        return np.concatenate(found)[np.arange(count), last]


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _scores(params: Any, batch: dict[str, Array], *, config: Config, mesh: jax.sharding.Mesh | None) -> Array:
    """Scores at every position of a batch [A, B, T], float32."""

    def run(params: Any, batch: dict[str, Array]) -> Array:
        return jax.lax.map(lambda one: reward.scores(params, one, config)[0], batch)

    if mesh is None:
        return run(params, batch)
    specs = sharding.param_specs(config.model, config.mesh), {name: sharding.batch_spec(name) for name in batch}
    out = sharding.batch_spec("score_BT")
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(params, batch)
