"""Reads and writes safetensors one tensor at a time. All headers of a folder are checked before data is read.

The format: 8 bytes of header length, little-endian; a JSON header of names, dtypes, shapes and byte ranges; the bytes.
The safetensors library is not used, because it saves entire dictionaries and maps entire files.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import check

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
_BLOCK_BYTES = 2**22
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The place of a tensor's bytes."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(tensor: Stored) -> np.ndarray:
    """Reads the tensor in its stored dtype."""
    count = math.prod(tensor.shape)
    return np.fromfile(tensor.path, tensor.dtype, count, offset=tensor.offset).reshape(tensor.shape)


def write(tensor: Stored, values: np.ndarray) -> None:
    """Casts the values to the tensor's dtype and writes them to its place in a file of `create`."""
    assert values.shape == tensor.shape, f"{values.shape} into {tensor}"
    # A few rows at a time, to avoid copies of the full tensor for the cast and for a transposed view.
    rows = max(1, _BLOCK_BYTES * len(values) // max(1, values.nbytes))
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        for start in range(0, len(values), rows):
            np.ascontiguousarray(values[start : start + rows]).astype(tensor.dtype, copy=False).tofile(file)


def create(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, shard_bytes: int) -> dict[str, Stored]:
    """Creates the files of a checkpoint, filled with zeros, and their index. `write` fills tensors in any order.

    A file has at most `shard_bytes` of data, or one larger tensor.
    """
    groups: list[list[str]] = [[]]
    left = shard_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and size > left:
            groups.append([])
            left = shard_bytes
        groups[-1].append(name)
        left -= size
    stored: dict[str, Stored] = {}
    for i, names in enumerate(groups, 1):
        path = folder / f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        stored |= _create_one(path, {name: shapes[name] for name in names}, dtype)
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in stored.values())},
        "weight_map": {name: tensor.path.name for name, tensor in sorted(stored.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return stored


def open_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from its index or from its single file `model.safetensors`.

    Raises ValueError if a file is missing, truncated or not safetensors, or does not match the index.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        check(single.is_file(), f"no weights in {folder}: it has neither {INDEX} nor model.safetensors")
        return _open_one(single)
    weight_map = read_json(index).get("weight_map", {})
    check(isinstance(weight_map, dict) and len(weight_map) > 0, f"{index} has no weight_map of tensor names to files")
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / str(file)
        check(path.parent == folder and path.is_file(), f"{path} is missing, though {INDEX} names it")
        found |= _open_one(path)
    absent = [name for name, file in weight_map.items() if name not in found or found[name].path.name != file]
    check(not absent, f"{folder}: {listed(absent, 'tensor')} not in the file that {INDEX} names")
    unlisted = [name for name in found if name not in weight_map]
    check(not unlisted, f"{folder}: {listed(unlisted, 'tensor')} in the files but not in {INDEX}")
    return found


def check_tensors(folder: Path, found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the tensors are exactly the expected ones, by name and shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = (("missing", missing), ("not of this model", extra), ("of the wrong shape", wrong))
    found_problems = "; ".join(f"{listed(names, 'tensor')} {what}" for what, names in problems if names)
    check(not found_problems, f"{folder} does not match its config.json: {found_problems}")


def listed(names: Iterable[str], what: str) -> str:
    """`2 tensors (a, b)`: the number, and the first three."""
    names = list(names)
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError for anything else."""
    return _json(path.read_bytes(), path)


def _create_one(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, Stored]:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return {
        name: Stored(path, 8 + len(text) + header[name]["data_offsets"][0], dtype, tuple(shape))
        for name, shape in shapes.items()
    }


def _open_one(path: Path) -> dict[str, Stored]:
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        check(len(start) == 8, f"{path} is truncated: it has {actual} bytes, fewer than a header")
        length = struct.unpack("<Q", start)[0]
        check(length <= 2**30, f"{path} is not a safetensors file: it gives a header length of {length} bytes")
        check(8 + length <= actual, f"{path} is truncated: its header ends at byte {8 + length}, the file at {actual}")
        header = _json(file.read(length), path)
    header.pop("__metadata__", None)
    stored = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    expected = max((tensor.offset + tensor.size for tensor in stored.values()), default=8 + length)
    check(expected <= actual, f"{path} is truncated: it has {actual} bytes of the {expected} that its header describes")
    check(expected == actual, f"{path} has {actual} bytes, {actual - expected} more than its header describes")
    held = 8 + length + sum(tensor.size for tensor in stored.values())
    check(held == expected, f"{path} is not a safetensors file: its tensors overlap or leave gaps")
    return stored


def _entry(path: Path, name: str, entry: dict, data: int) -> Stored:
    check(
        isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry),
        f"{path} is not a safetensors file: the header's entry of {name} lacks dtype, shape or data_offsets",
    )
    dtype = entry["dtype"]
    check(dtype in DTYPES, f"{path}: {name} has the dtype {dtype}; supported: {', '.join(DTYPES)}")
    numbers = (*entry["shape"], *entry["data_offsets"])
    check(
        all(type(n) is int and n >= 0 for n in numbers) and len(entry["data_offsets"]) == 2,
        f"{path} is not a safetensors file: the header's entry of {name} has a bad shape or bad data_offsets",
    )
    start, end = entry["data_offsets"]
    tensor = Stored(path, data + start, DTYPES[dtype], tuple(entry["shape"]))
    check(
        end - start == tensor.size,
        f"{path}: {name} has {end - start} bytes, but its shape {list(tensor.shape)} of {dtype} takes {tensor.size}",
    )
    return tensor


def _json(text: bytes, path: Path) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: invalid JSON ({error})") from error
    check(isinstance(value, dict), f"{path} is damaged: expected a JSON object")
    return value
