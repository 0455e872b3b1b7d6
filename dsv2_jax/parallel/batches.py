"""Places batches on the mesh: each process reads only the rows that its own devices need."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv2_jax.config import Mesh
from dsv2_jax.parallel import context, sharding
from dsv2_jax.parallel.mesh import BATCH


class BatchPlacement:
    """Makes arrays over all devices from this process's rows of batches of `rows` sequences.

    mine: The rows of a batch that this process reads, in rising order; None for all, on a single device.
    """

    def __init__(self, mesh: jax.sharding.Mesh | None, sizes: Mesh, rows: int) -> None:
        self._mesh, self._sizes, self._rows = mesh, sizes, rows
        self.mine: np.ndarray | None = None
        if mesh is not None:
            devices = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((rows,))
            self.mine = np.unique(np.concatenate([np.arange(rows)[part] for part in devices.values() if part]))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array | np.ndarray]:
        """Leaves [A, B, T, ...] of the B rows `mine` as arrays [A, rows, T, ...], sharded by `sharding.batch_spec`."""
        if self._mesh is None:
            return dict(batch)
        return {name: self._put(name, leaf) for name, leaf in batch.items()}

    def _put(self, name: str, leaf: np.ndarray) -> jax.Array:
        assert self._mesh is not None and self.mine is not None
        first = self.mine
        order = context.order(leaf.shape[2], self._sizes.context)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(self._rows)
            at = int(np.searchsorted(first, start))
            return leaf[:, at : at + stop - start, order[index[2]]]

        shape = (leaf.shape[0], self._rows, *leaf.shape[2:])
        return jax.make_array_from_callback(shape, NamedSharding(self._mesh, sharding.batch_spec(name)), part)
