"""Reads and writes the Orbax parameters of a run slice by slice, so that no stacked leaf is in memory in full.

Orbax stores each leaf as a zarr array named `part.leaf`. The reader supports the formats of `_METADATA` (OCDBT or plain
files, zarr 2 or 3). The writer makes plain zarr files, one chunk per layer and expert, with Orbax's own metadata.
"""

import collections
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsv2_jax.config import check
from dsv2_jax.parameters import letters, per_expert
from dsv2_jax.training import checkpoint, integrity

Tree = dict[str, dict[str, tuple[int, ...]]]

_CHUNK_BYTES = 2**26
_HANDLERS = {
    "params": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
    "checksums": "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
}


Index = tuple[int | slice, ...]


class _Slices:
    """The base of reader and writer: checksums of the slices."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._sums: collections.Counter[str] = collections.Counter()
        self._elements: collections.Counter[str] = collections.Counter()
        self._counted: set[tuple[str, tuple[range, ...]]] = set()

    def sums(self) -> dict[str, int]:
        """The checksums, as in a checkpoint, of the parameters whose slices have all been read or written."""
        sizes = {
            f"params.{part}.{name}": math.prod(s) for part, names in self._tree.items() for name, s in names.items()
        }
        return {name: total % 2**32 for name, total in self._sums.items() if self._elements[name] == sizes[name]}

    def _count(self, part: str, name: str, index: Index, values: np.ndarray) -> None:
        """Adds a slice to the checksum. Devices with the same slice read it once each, but it counts once."""
        shape, key = self._tree[part][name], f"params.{part}.{name}"
        ranges = integrity.ranges_of(shape, index)
        if (key, ranges) not in self._counted:
            self._counted.add((key, ranges))
            self._elements[key] += values.size
            self._sums[key] += integrity.sum_of_slice(values, shape, ranges)


class Reader(_Slices):
    """The parameters in a folder `RUN/checkpoints/<step>/params`."""

    def __init__(self, folder: Path, tree: Tree) -> None:
        """Raises ValueError if the folder is damaged or has another tree of shapes."""
        super().__init__(tree)
        self._run, self._step = folder.parents[2], int(folder.parent.name)
        path = folder / "_METADATA"
        check(path.is_file(), f"no parameters in {folder}: {path.name} is missing")
        with checkpoint.reading(self._run, self._step):
            metadata = json.loads(path.read_text(encoding="utf-8"))
            found = {".".join(k["key"] for k in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()}
        wanted = {f"{part}.{name}" for part, names in tree.items() for name in names}
        check(
            found == wanted,
            f"{folder} does not match the run's config.json: "
            f"missing {sorted(wanted - found)}, unknown {sorted(found - wanted)}",
        )

        # Two, because a Hugging Face tensor may have slices of two leaves. Their chunks stay in memory.
        @functools.lru_cache(maxsize=2)
        def leaf(part: str, name: str) -> ts.TensorStore:
            return _open(folder, metadata, part, name, tree[part][name])

        self._leaf = leaf
        for part, names in tree.items():
            for name, shape in names.items():
                with checkpoint.reading(self._run, self._step):
                    stored = leaf(part, name).shape
                check(
                    stored == shape,
                    f"{folder}: {part}.{name} has the shape {list(stored)}; the run's config.json describes "
                    f"{list(shape)}",
                )

    def read(self, part: str, name: str, index: Index) -> np.ndarray:
        """`params[part][name][index]`, float32. If slices are read leaf by leaf, each chunk is decoded once.

        Raises ValueError if the checkpoint is damaged.
        """
        with checkpoint.reading(self._run, self._step):
            values = self._leaf(part, name)[index].read().result().astype(np.float32, copy=False)
        self._count(part, name, index, values)
        return values

    def check_intact(self) -> None:
        """Raises ValueError if a parameter whose slices were all read differs from what was saved.

        A parameter that is split over processes is not checked, because each reads only a part of it.
        """
        checkpoint.check_intact(self._run, self._step, self.sums)


class Writer(_Slices):
    """Creates the folder `checkpoints/<step>` with this tree in float32 as its item `params`.

    The folder is complete after `write` of every slice and `finish`.
    """

    def __init__(self, folder: Path, tree: Tree) -> None:
        super().__init__(tree)
        self._folder = folder
        params = folder / "params"
        (params / "array_metadatas").mkdir(parents=True)
        leaves = [(part, name, shape) for part, names in tree.items() for name, shape in names.items()]
        chunks = [_chunk(name, shape) for _, name, shape in leaves]
        self._arrays = {
            (part, name): _create(params / f"{part}.{name}", shape, chunk)
            for (part, name, shape), chunk in zip(leaves, chunks, strict=True)
        }
        tree_metadata = {
            str((part, name)): {
                "key_metadata": [{"key": part, "key_type": 2}, {"key": name, "key_type": 2}],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
            }
            for part, name, shape in leaves
        }
        array_metadatas = [
            {
                "array_metadata": {
                    "param_name": f"{part}.{name}",
                    "write_shape": list(shape),
                    "chunk_shape": list(chunk),
                    "ext_metadata": None,
                }
            }
            for (part, name, shape), chunk in zip(leaves, chunks, strict=True)
        ]
        metadata = {
            "tree_metadata": tree_metadata,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        _write_json(params / "_METADATA", metadata)
        _write_json(params / "array_metadatas" / "process_0", {"array_metadatas": array_metadatas})
        _write_json(folder / "_CHECKPOINT_METADATA", {"item_handlers": _HANDLERS, "custom_metadata": {}})

    def write(self, part: str, name: str, index: Index, values: np.ndarray) -> None:
        """`params[part][name][index] = values`."""
        self._arrays[part, name][index].write(values).result()
        self._count(part, name, index, values)

    def finish(self) -> None:
        """Writes the checksums."""
        (self._folder / "checksums").mkdir()
        _write_json(self._folder / "checksums" / "metadata", self.sums())


def _open(folder: Path, metadata: dict[str, Any], part: str, name: str, shape: tuple[int, ...]) -> ts.TensorStore:
    base = f"file://{folder.absolute()}/"
    key = f"{part}.{name}/"
    store = {"driver": "ocdbt", "base": base, "path": key} if metadata["use_ocdbt"] else base + key
    spec = {"driver": "zarr3" if metadata["use_zarr3"] else "zarr", "kvstore": store}
    array = ts.open(spec, open=True, read=True).result()
    lead = _leading(name, shape)
    chunks = [c or n for c, n in zip(array.chunk_layout.read_chunk.shape or shape, shape, strict=True)]
    if all(c == 1 for c in chunks[:lead]):
        return array
    # The cache holds all chunks of one slice, so that a chunk shared by neighbouring slices is decoded once. The extra
    # MiB keeps the last chunk from being evicted and decoded again for every slice.
    covered = [c if i < lead else math.ceil(n / c) * c for i, (n, c) in enumerate(zip(shape, chunks, strict=True))]
    limit = math.prod(covered) * array.dtype.numpy_dtype.itemsize + 2**20
    context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
    return ts.open(spec, open=True, read=True, context=context).result()


def _create(folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> ts.TensorStore:
    metadata = {
        "shape": shape,
        "chunks": chunk,
        "dtype": "<f4",
        "compressor": {"id": "zstd", "level": 1},
        "dimension_separator": ".",
    }
    spec = {"driver": "zarr", "kvstore": f"file://{folder.absolute()}/", "metadata": metadata}
    # No sync after each chunk: the caller syncs once at the end.
    return ts.open(spec, create=True, open=True, context=ts.Context({"file_io_sync": False})).result()


def _leading(name: str, shape: tuple[int, ...]) -> int:
    """Number of leading axes for layers and experts, which are separate tensors in Hugging Face files."""
    return len(shape) - len(letters(name)) + per_expert(name)


def _chunk(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One layer and expert, its longest axis halved until a float32 chunk has at most `_CHUNK_BYTES`."""
    lead = _leading(name, shape)
    chunk = [1] * lead + list(shape[lead:])
    while math.prod(chunk) * 4 > _CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = math.ceil(chunk[longest] / 2)
    return tuple(chunk)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
