"""Loads a model from one path: a run's folder, one of its steps, or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import hf, parameters
from dsv2_jax.config import Batch, Compute, Config, Model, check
from dsv2_jax.data import corpora
from dsv2_jax.data import tokenizer as tokenizers
from dsv2_jax.data.corpora import Corpus
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.hf import arrays
from dsv2_jax.inference import programs
from dsv2_jax.inference.quantize import Weights
from dsv2_jax.model.layers import stored_dtype
from dsv2_jax.ops.switch import compute_dtype
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.mesh import sizes
from dsv2_jax.training import checkpoint, integrity, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to run. params: in the form of the function that loaded it. tokenizer: None if there is none."""

    model: Model
    params: Any
    tokenizer: Tokenizer | None
    config: Config  # the run's; for a Hugging Face folder one that evaluates it on the built-in corpus

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError if the folder has none."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer, so text cannot be read; give token ids instead")
        return self.tokenizer


def load(folder: Path, mesh: jax.sharding.Mesh | None = None, *, masters: bool = True) -> Loaded:
    """Loads config, tokenizer and parameters in the form of training, `parameters.tree`.

    With a mesh, each device reads its own shards. masters: whether parameters are float32; if not, matrices have the
    dtype in which the config computes, which gives the same forward pass. Raises FileNotFoundError if there is no
    checkpoint, ValueError for files that are damaged, hold NaN or infinity, or do not fit together.
    """
    config, tokenizer = _described(folder)
    dtype = jnp.dtype(jnp.float32) if masters else compute_dtype(config.compute)
    if hf.is_hf(folder):
        _, params = hf.load_params(folder, mesh, dtype)
    elif dtype == jnp.float32:
        _, params = checkpoint.restore_params(*run_folder.locate(folder), mesh)
    else:
        params = _read_layers(_reader(folder, config.model), config.model, mesh, dtype)
    integrity.check_finite(params, str(folder))
    config = dataclasses.replace(config, mesh=sizes(mesh))
    return Loaded(model=config.model, params=params, tokenizer=tokenizer, config=config)


def load_for_engine(
    folder: Path,
    mesh: jax.sharding.Mesh | None = None,
    *,
    compute: Compute | None = None,
    weights: Weights = "compute",
) -> Loaded:
    """Loads config, tokenizer and parameters in the form of an engine with these settings.

    Converts one matrix at a time, so memory never holds the full model in float32 (see `programs.read`). Raises as
    `load` does.
    """
    config, tokenizer = _described(folder)
    compute = compute or Compute()
    setup = programs.Setup(model=config.model, compute=compute, form="compute", weights=weights, devices=mesh)
    if hf.is_hf(folder):
        params = programs.read(hf.reader(folder)[1], setup)
    else:
        reader = _reader(folder, config.model)
        params = programs.read(reader.read, setup)
        reader.check_intact()
    integrity.check_finite(params, str(folder))
    config = dataclasses.replace(config, mesh=sizes(mesh))
    return Loaded(model=config.model, params=params, tokenizer=tokenizer, config=config)


def _reader(folder: Path, model: Model) -> arrays.Reader:
    run, step = run_folder.locate(folder)
    return arrays.Reader(run / "checkpoints" / str(step) / "params", parameters.tree(model))


def _read_layers(reader: arrays.Reader, model: Model, mesh: jax.sharding.Mesh | None, dtype: Any) -> Any:
    """`parameters.tree` with matrices in `dtype`; float32 exists for one layer of a shard at a time."""
    shardings = sharding.on(mesh, sharding.param_specs(model, sizes(mesh)))

    def leaf(part: str, name: str, shape: tuple[int, ...]) -> jax.Array:
        own = stored_dtype(name, dtype)

        def shard(index: Any) -> np.ndarray:
            if len(shape) < 3:
                return reader.read(part, name, index).astype(own)
            values = np.empty([len(range(*at.indices(n))) for at, n in zip(index, shape, strict=True)], own)
            for place, layer in enumerate(range(*index[0].indices(shape[0]))):
                values[place] = reader.read(part, name, (layer, *index[1:]))
            return values

        return jax.make_array_from_callback(shape, shardings[part][name], shard)

    tree = parameters.tree(model)
    params = {part: {name: leaf(part, name, shape) for name, shape in tree[part].items()} for part in tree}
    reader.check_intact()
    return params


def _described(folder: Path) -> tuple[Config, Tokenizer | None]:
    """The config and the tokenizer of a folder."""
    model = model_of(folder)
    if hf.is_hf(folder):
        config = Config(
            workdir=folder, model=model, batch=Batch(size=8, length=min(1024, model.max_position_embeddings))
        )
        tokenizer = tokenizers.load(folder) if (folder / "tokenizer.json").is_file() else None
    else:
        run, _ = run_folder.locate(folder)
        config = run_folder.read_config(run)
        tokenizer = tokenizers.load(run / "tokenizer") if (run / "tokenizer").is_dir() else None
    if tokenizer is not None:
        check(
            tokenizer.vocab_size <= model.vocab_size,
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, but the model's vocabulary has only "
            f"{model.vocab_size}: they do not belong together",
        )
    return config, tokenizer


def model_of(folder: Path) -> Model:
    """The model section of a folder's config. Raises as `load` does."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no such folder")
    if hf.is_hf(folder):
        return hf.read_model(folder)
    run, _ = run_folder.locate(folder)
    return run_folder.read_config(run).model


def open_data(config: Config) -> tuple[Corpus, Tokenizer]:
    """The corpus and the tokenizer of a training run whose folder is open. Copies the tokenizer to the folder.

    Raises ValueError as `corpora.prepare` and `tokenizer_for` do, and if the folder has another tokenizer.
    """
    corpus = corpora.prepare(config.data)
    tokenizer = tokenizer_for(config, corpus)
    if processes.is_first():
        run_folder.keep_tokenizer(config.workdir, tokenizer.save)
    return corpus, tokenizer


def tokenizer_for(config: Config, corpus: Corpus) -> Tokenizer:
    """The tokenizer of a training run: that of `config.init`, unless `data.tokenizer` names another.

    A run that continues uses its own copy, because its init may be gone. Raises ValueError if there is none, or if it
    has more ids than the model.
    """
    if config.init is None or config.data.tokenizer != "train":
        return tokenizers.for_config(config.data, config.model.vocab_size, corpus)
    folder = config.workdir / "tokenizer"
    if not run_folder.complete_steps(config.workdir):
        folder = config.init if hf.is_hf(config.init) else run_folder.locate(config.init)[0] / "tokenizer"
    return tokenizers.for_config(
        dataclasses.replace(config.data, tokenizer=str(folder)), config.model.vocab_size, corpus
    )


def start_params(config: Config, mesh: jax.sharding.Mesh | None) -> Any:
    """`params_for` of a run whose folder is open; stores their digest, or compares it when the run continues.

    Raises ValueError if `config.init` holds other parameters than when the run started.
    """
    params = params_for(config, mesh)
    run_folder.keep_init_digest(config.workdir, integrity.digest(params))
    return params


def params_for(config: Config, mesh: jax.sharding.Mesh | None) -> Any:
    """The parameters of `config.init`. Raises ValueError if their shapes do not match the config's model.

    A reward model that starts from a language model keeps the last norm and gets a score head of zeros.
    """
    assert config.init is not None
    loaded = load(config.init, mesh)
    there, params = parameters.tree(loaded.model), loaded.params
    if config.model.head == "score" and loaded.model.head == "tokens":
        zeros = jax.numpy.zeros_like(params["head"]["norm_D"])
        params = params | {"head": {"norm_D": params["head"]["norm_D"], "w_score_D": zeros}}
        there["head"] = dict.fromkeys(("norm_D", "w_score_D"), there["head"]["norm_D"])
    checkpoint.check_shapes(parameters.tree(config.model), there, config.init)
    return params
