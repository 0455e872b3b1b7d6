"""The device programs of the engine: the forward pass over prompt and new tokens, then sampling and scoring.

Every array has a leading axis Z of replicas. A replica is one device, or the devices of one tensor axis. It has its own
sequences and pages, and exchanges data with other replicas only in expert dispatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from dsv2_jax import config, parameters
from dsv2_jax.config import Compute, Model
from dsv2_jax.inference import quantize
from dsv2_jax.inference.quantize import Weights
from dsv2_jax.inference.sampling import Adjust, RowSettings, sample
from dsv2_jax.model import attention, transformer
from dsv2_jax.model.layers import cast
from dsv2_jax.ops import pages as page_arrays
from dsv2_jax.ops.formats import Format
from dsv2_jax.ops.matmul import dot
from dsv2_jax.ops.pages import LayerPages
from dsv2_jax.ops.switch import compute_dtype
from dsv2_jax.parallel import collectives, mesh, sharding
from pallas_kernels.quantized import Quantized

# (part, name, slices) -> float32 values of the tree of `parameters.tree`
Read = Callable[[str, str, tuple[slice, ...]], np.ndarray]
BY_REPLICA = PartitionSpec(mesh.BATCH)  # arrays with a leading axis of replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The static settings of the programs."""

    model: Model
    compute: Compute
    form: Format
    weights: Weights
    devices: jax.sharding.Mesh | None
    routes: bool = False  # also return the expert choices of tokens

    @property
    def mesh(self) -> config.Mesh:
        """Sizes of the mesh. Parameters have no storage splits (see `sharding`), so a step gathers none of them."""
        return dataclasses.replace(mesh.sizes(self.devices), shard="optimizer")

    @property
    def replicas(self) -> int:
        """Number of replicas."""
        return self.mesh.size(*mesh.BATCH)


def check_mesh(sizes: config.Mesh) -> None:
    """Raises ValueError for a mesh on which generation does not run."""
    mesh.check_axes(sizes, (*mesh.BATCH, *mesh.TENSOR), "generation")


class StepInputs(NamedTuple):
    """The int32 inputs of one forward pass. Of its T tokens the first N are one per row; the rest form the chunk.

    real_ZT: 1 for a token, 0 for padding. last_ZN: the index of each row's last token. For the page table and the
    blocks of the chunk see `paged.Plan`.
    """

    tokens_ZT: np.ndarray
    real_ZT: np.ndarray
    times_ZT: np.ndarray
    page_ZT: np.ndarray
    table_ZNP: np.ndarray
    blocks_ZM: np.ndarray
    used_Z: np.ndarray
    last_ZN: np.ndarray


def blank(replicas: int, rows: int, chunk: int, blocks: int, pages: int) -> StepInputs:
    """Inputs that are all padding: `rows` rows of up to `pages` pages, and `chunk` tokens in `blocks` blocks."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((replicas, *shape), np.int32)

    return StepInputs(
        tokens_ZT=zeros(rows + chunk),
        real_ZT=zeros(rows + chunk),
        times_ZT=zeros(rows + chunk),
        page_ZT=zeros(rows + chunk),
        table_ZNP=zeros(rows, pages),
        blocks_ZM=zeros(blocks),
        used_Z=zeros(),
        last_ZN=zeros(rows),
    )


class Drawn(NamedTuple):
    """New tokens [Z, N], their log-probabilities, and the TOP most probable tokens with theirs ([Z, N, 0]: none)."""

    token_ZN: Array
    logprob_ZN: Array
    top_ZNK: Array
    top_logprob_ZNK: Array


def prepare(params: Any, setup: Setup) -> Any:
    """The parameters as the programs take them: unstacked, matrices in the compute dtype or quantized.

    Returns the result of `read` unchanged.
    """
    return preparation(setup)(params) if {"dense", "moe"} & params.keys() else params


def read(values: Read, setup: Setup) -> Any:
    """As `prepare`, one matrix at a time. Each process reads only the slices of its own devices.

    Besides the result, memory holds one float32 matrix at a time (for experts, those of one layer).
    """
    prepared: dict[str, dict[str, Any]] = {}
    for part, names in parameters.tree(setup.model).items():
        for name, shape in names.items():
            if part in ("dense", "moe"):
                for layer in range(shape[0]):
                    at = functools.partial(_of_layer, values, part, name, layer)
                    prepared.setdefault(f"{part}_{layer}", {}).update(_read_one(name, at, setup))
            else:
                at = functools.partial(values, part, name)
                prepared.setdefault(part, {}).update(_read_one(name, at, setup))
    return prepared


def _of_layer(values: Read, part: str, name: str, layer: int, slices: tuple[slice, ...]) -> np.ndarray:
    return values(part, name, (slice(layer, layer + 1), *slices))[0]


def _read_one(name: str, values: Callable[[Any], np.ndarray], setup: Setup) -> dict[str, Any]:
    """One layer's parameter as the programs take it, by its name there."""
    where = sharding.on(setup.devices, sharding.spec("", name, setup.model, setup.mesh, stored=False))
    w = jax.make_array_from_callback(parameters.shape(name, setup.model), where, values)
    return jax.block_until_ready(_prepare_one(name, setup)({"": {name: w}})[""])


@functools.cache
def preparation(setup: Setup) -> Any:
    """The program that moves parameters from the layout of training to the layout of generation.

    It is one program because processes that moved arrays one by one could start in different orders and deadlock.
    """
    specs = _param_specs(_prepared_shapes(setup), setup)

    def prepare_weights(params: Any) -> Any:
        return _prepared(params, setup)

    return jax.jit(prepare_weights, out_shardings=sharding.on(setup.devices, specs))


@functools.cache
def _prepare_one(name: str, setup: Setup) -> Any:
    """As `preparation`, for one parameter of one layer, whose sharding does not change."""
    one = functools.partial(_in_formats, setup=setup)
    shapes = {"": {name: jax.ShapeDtypeStruct(parameters.shape(name, setup.model), jnp.float32)}}
    specs = _param_specs(jax.eval_shape(one, shapes), setup)
    return jax.jit(one, out_shardings=sharding.on(setup.devices, specs))


def _prepared(params: Any, setup: Setup) -> Any:
    return _in_formats(transformer.unstack(params), setup)


def _in_formats(unstacked: Any, setup: Setup) -> Any:
    """Converts float32 parameters to the formats and axis orders of the programs."""
    dtype = compute_dtype(setup.compute)
    # The forward pass casts the rows of the embedding that it reads. Casting them here gives the same values in half
    # the memory.
    unstacked = {
        part: {name: w.astype(dtype) if name == "w_embed_WD" else w for name, w in named.items()}
        for part, named in unstacked.items()
    }
    if setup.weights != "compute":
        unstacked = quantize.quantize(unstacked, setup.weights)
    return cast(attention.by_head(unstacked), dtype)


def _prepared_shapes(setup: Setup) -> Any:
    stacked = {
        part: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in named.items()}
        for part, named in parameters.tree(setup.model).items()
    }
    return jax.eval_shape(functools.partial(_prepared, setup=setup), stacked)


def empty(setup: Setup, pages: int, slots: int) -> tuple[LayerPages, ...]:
    """The cache of every replica, zeros, on its devices."""
    specs = _cache_specs(setup)
    # Without an explicit sharding, later programs would be compiled again.
    return jax.jit(_empty(setup, pages, slots), out_shardings=sharding.on(setup.devices, specs))()


def _empty(setup: Setup, pages: int, slots: int) -> Any:
    def make() -> tuple[LayerPages, ...]:
        layers = page_arrays.empty(setup.model, setup.mesh, pages, slots, setup.form, compute_dtype(setup.compute))
        return jax.tree.map(lambda x: x[None], layers)

    return _spread(make, setup, (), _cache_specs(setup))


def described(setup: Setup, pages: int, slots: int) -> tuple[Any, tuple[LayerPages, ...]]:
    """The shapes and shardings of the results of `prepare` and `empty`. Works for devices that are not attached."""

    def placed(shapes: Any, specs: Any) -> Any:
        on = sharding.on(setup.devices, specs)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, on)

    prepared, layers = _prepared_shapes(setup), jax.eval_shape(_empty(setup, pages, slots))
    return placed(prepared, _param_specs(prepared, setup)), placed(layers, _cache_specs(setup))


def _cache_specs(setup: Setup) -> Any:
    one = jax.eval_shape(
        lambda: page_arrays.empty(setup.model, config.SINGLE, 2, 16, setup.form, jnp.dtype(jnp.float32))
    )
    by_head = setup.model.attention.kind != "mla"
    return jax.tree.map(lambda _: PartitionSpec(mesh.BATCH, None, None, *mesh.TENSOR) if by_head else BY_REPLICA, one)


def _param_specs(prepared: Any, setup: Setup) -> Any:
    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        part, name = (key.key for key in path[:2])
        axes = sharding.spec(part, name, setup.model, setup.mesh, stored=False)
        return PartitionSpec(*(a if size > 1 else None for a, size in zip(axes, leaf.shape, strict=True)))

    return jax.tree_util.tree_map_with_path(spec, prepared)


def _spread(function: Any, setup: Setup, in_specs: Any, out_specs: Any) -> Any:
    """Maps the function of one replica, whose arrays keep a leading axis of 1, over the mesh."""
    if setup.devices is None:
        return function
    return jax.shard_map(function, mesh=setup.devices, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="layers")
def forward(
    prepared: Any, layers: tuple[LayerPages, ...], inputs: StepInputs, *, setup: Setup
) -> tuple[Array, Array, tuple[LayerPages, ...], Array | None]:
    """Returns (hidden states [Z, N, D] of `last_ZN`, those [Z, T - N, D] of the chunk, the updated cache, experts).

    experts: int16 [Z, T, L, K], the choices of all tokens in the MoE layers; None unless `setup.routes`.
    """

    def replica(prepared: Any, layers: tuple[LayerPages, ...], inputs: StepInputs) -> Any:
        layers, one = jax.tree.map(lambda x: x[0], (layers, inputs))
        placement = page_arrays.Placement(one.table_ZNP, one.page_ZT, one.times_ZT, one.blocks_ZM, one.used_Z)
        net = transformer.Transformer(setup.model, setup.compute, setup.mesh, unrolled=True)
        rows = one.tokens_ZT[None], one.times_ZT[None], one.real_ZT[None]
        out: Any = net.apply({"params": prepared}, *rows, cache=page_arrays.Cache(layers, placement, setup.form))
        hidden_TD = out.hidden_BTD[0]
        experts_TLK = None
        if setup.routes:
            experts_TLK = jnp.swapaxes(out.statistics["experts_BTK"][:, 0], 0, 1).astype(jnp.int16)
        results = hidden_TD[one.last_ZN], hidden_TD[one.table_ZNP.shape[0] :], out.cache.layers, experts_TLK
        return jax.tree.map(lambda x: x[None], results)

    cache = _cache_specs(setup)
    specs = (_param_specs(prepared, setup), cache, BY_REPLICA)
    return _spread(replica, setup, specs, (BY_REPLICA, BY_REPLICA, cache, BY_REPLICA))(prepared, layers, inputs)


@functools.partial(jax.jit, static_argnames=("setup", "top"))
def draw(head: Any, hidden_ZND: Array, rows: RowSettings, adjust: Adjust | None, *, setup: Setup, top: int) -> Drawn:
    """Draws the next token of every row. head: the parameters of that name. top: 0 or TOP alternatives."""

    def replica(head: Any, hidden_1ND: Array, rows: RowSettings, adjust: Adjust | None) -> Drawn:
        rows, adjust = jax.tree.map(lambda x: x[0], (rows, adjust))
        logits_NW = _logits(head, hidden_1ND, setup)
        token_N = sample(logits_NW, rows, adjust)
        sum_N1 = jax.nn.logsumexp(logits_NW, axis=-1, keepdims=True)
        values_NK, tops_NK = jax.lax.top_k(logits_NW, top)
        logprob_N = (jnp.take_along_axis(logits_NW, token_N[:, None], axis=-1) - sum_N1)[:, 0]
        return jax.tree.map(lambda x: x[None], Drawn(token_N, logprob_N, tops_NK, values_NK - sum_N1))

    specs = (_head_specs(head, setup), BY_REPLICA, BY_REPLICA, BY_REPLICA)
    return _spread(replica, setup, specs, BY_REPLICA)(head, hidden_ZND, rows, adjust)


@functools.partial(jax.jit, static_argnames="setup")
def score(head: Any, hidden_ZCD: Array, at_ZS: Array, targets_ZS: Array, *, setup: Setup) -> tuple[Array, Array]:
    """Log-probabilities float32 [Z, S] of the targets after the hidden states at `at_ZS`, and whether each is greedy.

    S may be much smaller than C: often only an answer is scored, and the head is a large matmul.
    """

    def replica(head: Any, hidden_1CD: Array, at_1S: Array, targets_1S: Array) -> tuple[Array, Array]:
        logits_SW = _logits(head, hidden_1CD[:, at_1S[0]], setup)
        own_S = jnp.take_along_axis(logits_SW, targets_1S[0][:, None], axis=-1)[:, 0]
        logprob_S = own_S - jax.nn.logsumexp(logits_SW, axis=-1)
        return logprob_S[None], (own_S == jnp.max(logits_SW, axis=-1))[None]  # argmax is slow on CPU

    specs = (_head_specs(head, setup), BY_REPLICA, BY_REPLICA, BY_REPLICA)
    return _spread(replica, setup, specs, (BY_REPLICA, BY_REPLICA))(head, hidden_ZCD, at_ZS, targets_ZS)


@functools.partial(jax.jit, static_argnames="setup")
def logits(head: Any, hidden_ZCD: Array, *, setup: Setup) -> Array:
    """Logits float32 [Z, C, W] of these hidden states."""

    def replica(head: Any, hidden_1CD: Array) -> Array:
        return _logits(head, hidden_1CD, setup)[None]

    return _spread(replica, setup, (_head_specs(head, setup), BY_REPLICA), BY_REPLICA)(head, hidden_ZCD)


def _head_specs(head: Any, setup: Setup) -> Any:
    return _param_specs({"head": head}, setup)["head"]


def _logits(head: Any, hidden_1ND: Array, setup: Setup) -> Array:
    """Logits float32 [N, W]; the dtype of activations would be too coarse for log-probabilities."""
    w_DW, hidden_ND = head["w_head_DW"], hidden_1ND[0]
    if isinstance(w_DW, Quantized):
        logits_NW = dot(hidden_ND, w_DW.values.astype(hidden_ND.dtype)) * w_DW.scale
    else:
        logits_NW = dot(hidden_ND, w_DW)
    return collectives.gather(logits_NW, mesh.TENSOR, 1, setup.mesh)
