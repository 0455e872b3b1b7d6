"""Converts runs to Hugging Face folders and back, tensor by tensor. Output folders are atomic: complete or absent."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import parameters
from dsv2_jax.config import Batch, Config, Data, Model, check
from dsv2_jax.data import tokenizer
from dsv2_jax.hf import arrays, files
from dsv2_jax.hf.configuration import from_hf_config, to_hf_config
from dsv2_jax.hf.names import Tensor, tensors
from dsv2_jax.model.layers import stored_dtype
from dsv2_jax.parallel import sharding
from dsv2_jax.parallel.mesh import sizes
from dsv2_jax.storage import published
from dsv2_jax.training import run_folder

Progress = Callable[[int, int], None]  # (bytes done, bytes in total) of the Hugging Face folder


def _silent(_done: int, _total: int) -> None:
    pass


def export(
    run: Path,
    out: Path,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    progress: Progress = _silent,
) -> None:
    """Writes the newest parameters of a run as safetensors, with config.json and the tokenizer if the run has one.

    `dtype` is float32 or bfloat16 (round to nearest). A file has at most `shard_bytes`, or one larger tensor. Memory
    holds one tensor at a time and the checkpoint chunks that contain it. Raises ValueError if `out` is not empty, the
    model has no Hugging Face architecture or the checkpoint is damaged, FileNotFoundError if there is no checkpoint.
    """
    model = run_folder.read_config(run).model
    folder = run / "checkpoints" / str(run_folder.latest_step(run)) / "params"
    vocabulary = tokenizer.load(run / "tokenizer") if (run / "tokenizer").exists() else None
    if vocabulary and model.head == "score":
        vocabulary = vocabulary.padded()
    bos, eos, pad = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) if vocabulary else (None, None, None)
    settings = to_hf_config(model, dtype, bos, eos, pad)
    reader = arrays.Reader(folder, parameters.tree(model))
    todo = list(tensors(model))
    _check_free(out)
    with published(out) as partial:
        _write_json(partial / "config.json", settings)
        _write_json(partial / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
        if vocabulary:
            vocabulary.save_hf(partial)
        # Files are in the order of the layers, as readers expect; the conversion goes leaf by leaf.
        shapes = {t.hf: t.shape for t in sorted(todo, key=_layer)}
        stored = files.create(partial, shapes, np.dtype(jnp.dtype(dtype)), shard_bytes)
        total, done = sum(s.size for s in stored.values()), 0
        for tensor in todo:
            slices = [reader.read(tensor.part, name, tensor.index) for name in tensor.names]
            files.write(stored[tensor.hf], tensor.layout.to_hf(slices))
            done += stored[tensor.hf].size
            progress(done, total)
        reader.check_intact()
        os.sync()


def import_(hf: Path, out: Path, progress: Progress = _silent) -> None:
    """Converts a Hugging Face folder to a run: config.json, tokenizer, and float32 parameters as step 0.

    Checks all headers before it reads data. Memory holds one tensor at a time. Raises ValueError for tensors that are
    missing, extra, truncated or of the wrong shape, for unsupported settings, a tokenizer with too many ids, or an
    `out` that is not empty.
    """
    model, found = open_checked(hf)
    vocabulary = _tokenizer(hf, model)
    _check_free(out)
    with published(out) as partial:
        data = Data(tokenizer=str(out / "tokenizer" / "tokenizer.json")) if vocabulary else Data()
        batch = Batch(length=min(Batch.length, model.max_position_embeddings))
        run_folder.write_config(partial, Config(workdir=out, model=model, data=data, batch=batch))
        if vocabulary:
            vocabulary.save(partial / "tokenizer")
        writer = arrays.Writer(partial / "checkpoints" / "0", parameters.tree(model))
        _fill(model, found, writer.write, progress)
        writer.finish()
        os.sync()


def read_model(hf: Path) -> Model:
    """The model that a Hugging Face folder's config.json describes. Raises ValueError as `from_hf_config` does."""
    path = hf / "config.json"
    check(path.is_file(), f"no Hugging Face folder in {hf}: config.json is missing")
    return from_hf_config(files.read_json(path))


def open_checked(hf: Path) -> tuple[Model, dict[str, files.Stored]]:
    """The model of a Hugging Face folder and the places of its tensors, after checking their names and shapes.

    Raises ValueError as `import_` does.
    """
    model = read_model(hf)
    found = files.open_folder(hf)
    files.check_tensors(hf, found, {t.hf: t.shape for t in tensors(model)})
    return model, found


def load_params(
    hf: Path, mesh: jax.sharding.Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[Model, dict[str, dict[str, jax.Array]]]:
    """The model of a Hugging Face folder and its parameters: the tree of `parameters.tree`, matrices in `dtype`.

    Parameters of `parameters.KEPT_FLOAT32` are float32. With a mesh, they are sharded by `sharding.param_specs`, and a
    host reads only the shards of its devices; memory holds one more shard at a time. Raises ValueError as `import_`
    does.
    """
    model, found = open_checked(hf)
    sharding.check_model(model, sizes(mesh))
    shardings = sharding.on(mesh, sharding.param_specs(model, sizes(mesh)))
    sources = _sources(model)

    def leaf(part: str, name: str, shape: tuple[int, ...]) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return _read(found, sources[part, name], shape, index, stored_dtype(name, dtype))

        return jax.make_array_from_callback(shape, shardings[part][name], shard)

    tree = parameters.tree(model)
    return model, {part: {name: leaf(part, name, shape) for name, shape in tree[part].items()} for part in tree}


def reader(hf: Path) -> tuple[Model, Callable[[str, str, tuple[slice, ...]], np.ndarray]]:
    """The model of a Hugging Face folder, and a function for `params[part][name][slices]`, float32: `programs.Read`.

    Memory holds the requested slice and one tensor of the folder. Raises ValueError as `import_` does.
    """
    model, found = open_checked(hf)
    sources, tree = _sources(model), parameters.tree(model)
    return model, lambda part, name, slices: _read(found, sources[part, name], tree[part][name], slices, np.float32)


_Source = dict[tuple[int, ...], tuple[Tensor, int]]  # leading indices -> (tensor, index among its slices)


def _sources(model: Model) -> dict[tuple[str, str], _Source]:
    """The tensors of each parameter: {(part, name): ...}."""
    sources: dict[tuple[str, str], _Source] = {}
    for tensor in tensors(model):
        for place, name in enumerate(tensor.names):
            sources.setdefault((tensor.part, name), {})[tensor.index] = tensor, place
    return sources


def _read(
    found: dict[str, files.Stored], source: _Source, shape: tuple[int, ...], index: Any, dtype: Any
) -> np.ndarray:
    """The values at `index` (a slice for every axis) of a parameter of this shape."""
    lead = len(next(iter(source)))
    ranges = [range(*at.indices(size)) for at, size in zip(index, shape, strict=True)]
    values = np.empty([len(r) for r in ranges], dtype)
    for at in itertools.product(*ranges[:lead]):
        tensor, place = source[at]
        slices = tensor.layout.from_hf(files.read(found[tensor.hf]), tensor.slices)
        values[tuple(i - r.start for i, r in zip(at, ranges, strict=False))] = slices[place][index[lead:]]
    return values


def is_hf(folder: Path) -> bool:
    """Whether this is a Hugging Face folder, with safetensors or a config.json that has a model_type."""
    path = folder / "config.json"
    if (folder / files.INDEX).is_file() or (folder / "model.safetensors").is_file():
        return True
    return path.is_file() and "model_type" in files.read_json(path)


def _tokenizer(hf: Path, model: Model) -> tokenizer.Tokenizer | None:
    if not any((hf / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    vocabulary = tokenizer.load(hf)
    check(
        vocabulary.vocab_size <= model.vocab_size,
        f"{hf}: the tokenizer has {vocabulary.vocab_size} ids, more than the model's {model.vocab_size}",
    )
    return vocabulary


def _fill(
    model: Model,
    found: dict[str, files.Stored],
    put: Callable[[str, str, tuple[int, ...], np.ndarray], None],
    progress: Progress,
) -> None:
    total, done = sum(s.size for s in found.values()), 0
    for tensor in tensors(model):
        values = files.read(found[tensor.hf]).astype(np.float32, copy=False)
        for name, part in zip(tensor.names, tensor.layout.from_hf(values, tensor.slices), strict=True):
            put(tensor.part, name, tensor.index, part)
        done += found[tensor.hf].size
        progress(done, total)


def _check_free(out: Path) -> None:
    check(not out.exists() or (out.is_dir() and not any(out.iterdir())), f"{out} exists and is not an empty folder")


def _layer(tensor: Tensor) -> tuple[int, int]:
    """Sort key: embedding, layers in order, then the final norm and the head."""
    if tensor.part in ("embed", "head"):
        return (0 if tensor.part == "embed" else 2), 0
    return 1, int(tensor.hf.split(".")[2])


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
