"""The one table from dimensions to mesh axes, and what follows from it for parameters, gradients, state and batches.

A parameter is split in two ways. `tensor`, `expert` (over whole experts) and `pipeline` (over layers) split the
computation: each device works with its own part. All other splits are storage, as in ZeRO-3: the layer that needs a
parameter gathers it, and its gradient goes back as a reduce-scatter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from dsv2_jax import parameters
from dsv2_jax.config import AXES, Mesh, Model, check
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.collectives import Axes
from dsv2_jax.parallel.mesh import BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axes that each logical dimension asks for, the outermost first.

    Within a parameter an axis goes to the first dimension that asks for it. An axis that would only split storage is
    left out where it does not divide the dimension: that costs memory, never correctness.
    """

    batch: Axes = BATCH
    time: Axes = ("context",)
    layers: Axes = ("pipeline",)
    experts: Axes = ("expert",)
    model: Axes = ("fsdp", "context")
    query_latent: Axes = ("fsdp", "context")
    kv_latent: Axes = ("fsdp", "context")
    heads: Axes = ("tensor", "expert")
    kv_heads: Axes = ("tensor",)
    vocabulary: Axes = ("tensor", "expert")
    dense_width: Axes = ("tensor", "expert")
    shared_width: Axes = ("tensor", "expert")
    expert_width: Axes = ("tensor",)
    nope: Axes = ()
    rope: Axes = ()
    value: Axes = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            unknown = [axis for axis in axes if axis not in AXES]
            check(not unknown, f"rule {field.name}: no mesh axis {', '.join(unknown)}; there are {', '.join(AXES)}")
            check(len(set(axes)) == len(axes), f"rule {field.name} names an axis twice: {', '.join(axes)}")

    def axes(self, dim: str) -> Axes:
        """What this logical dimension asks for. Raises ValueError for a dimension that the table does not know."""
        check(dim in {field.name for field in dataclasses.fields(self)}, f"no sharding rule for the dimension {dim}")
        return getattr(self, dim)


RULES = Rules()


def is_storage(name: str, axis: str, dim: int) -> bool:
    """Whether `axis` over dimension `dim` of a layer's parameter splits where it lies, not what is computed with it."""
    if axis == "tensor":
        return name == "w_embed_WD"  # rows are looked up, nothing is multiplied
    return not (axis == "expert" and dim == 0 and parameters.letters(name)[0] == "E")


def split(name: str, model: Model, mesh: Mesh, rules: Rules = RULES) -> tuple[Axes, ...]:
    """The axes of each dimension of one layer's parameter.

    Raises ValueError where an axis that splits the computation does not divide a dimension.
    """
    taken: set[str] = set()
    result = []
    for i, (dim, size) in enumerate(zip(parameters.dims(name), parameters.shape(name, model), strict=True)):
        axes: Axes = ()
        for axis in rules.axes(dim):
            devices = mesh.size(axis)
            if devices == 1 or axis in taken:
                continue
            divides = size % mesh.size(*axes, axis) == 0
            if is_storage(name, axis, i) and not divides:
                continue
            check(divides, f"mesh.{axis} ({devices}) must divide the {size} {dim.replace('_', ' ')} of {name}")
            taken.add(axis)
            axes = (*axes, axis)
        result.append(axes)
    return tuple(result)


def spec(part: str, name: str, model: Model, mesh: Mesh, *, stored: bool = True) -> PartitionSpec:
    """How `params[part][name]` is laid over the mesh; not `stored`: without the axes that only split storage."""
    dims = [
        tuple(axis for axis in axes if stored or not is_storage(name, axis, i))
        for i, axes in enumerate(split(name, model, mesh))
    ]
    if part in ("dense", "moe"):
        pipeline = RULES.layers if part == "moe" and mesh.pipeline > 1 else ()
        dims.insert(0, pipeline)
    return PartitionSpec(*(axes or None for axes in dims))


def param_specs(model: Model, mesh: Mesh) -> dict:
    """Specs of the tree of `parameters.tree`, as the parameters lie between steps."""
    stored = mesh.shard == "parameters"
    return _specs(model, mesh, stored)


def optimizer_specs(model: Model, mesh: Mesh) -> dict:
    """Specs of one moment of the optimizer: split all ways, also where the parameters are whole (ZeRO-1)."""
    return _specs(model, mesh, stored=True)


def _specs(model: Model, mesh: Mesh, stored: bool) -> dict:
    tree = parameters.tree(model)
    return {part: {name: spec(part, name, model, mesh, stored=stored) for name in tree[part]} for part in tree}


def batch_spec(name: str) -> PartitionSpec:
    """How a leaf of a batch, with micro-batches A in front, is laid over the mesh: `tokens_BT` as [A, B, T].

    What follows sequences and time is whole on every device.
    """
    return PartitionSpec(None, *(RULES.axes(dim) for dim in parameters.dims(name)[:2]))


def on(mesh: jax.sharding.Mesh | None, specs: Any) -> Any:
    """Specs as shardings of this mesh; without one, the first device."""

    def leaf(spec: PartitionSpec) -> jax.sharding.Sharding:
        return NamedSharding(mesh, spec) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])

    return jax.tree.map(leaf, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def gather(p: dict[str, Array], model: Model, mesh: Mesh) -> dict[str, Array]:
    """One layer's parameters with their storage splits gathered: what the layer computes with."""
    if mesh.shard == "optimizer":
        return p
    whole = {}
    for name, w in p.items():
        for i, axes in enumerate(split(name, model, mesh)):
            w = collectives.gather(w, _storage(name, axes, i), i, mesh)
        whole[name] = w
    return whole


def reduce_gradients(gradients: dict, model: Model, mesh: Mesh) -> dict:
    """Each device's gradients, which are parts, added up: the optimizer's shards of the whole gradient."""

    def leaf(part: str, name: str, g: Array) -> Array:
        lead = len(g.shape) - len(parameters.letters(name))
        splits = split(name, model, mesh)
        if mesh.shard == "optimizer":
            for i, axes in enumerate(splits):
                g = collectives.scatter(g, _storage(name, axes, i), lead + i, mesh)
        split_over = {axis for axes in splits for axis in axes} | ({"pipeline"} if part == "moe" else set())
        return collectives.add(g, tuple(axis for axis in AXES if axis not in split_over), mesh)

    return _named(leaf, gradients)


def sum_of_squares(gradients: dict, model: Model, mesh: Mesh) -> Array:
    """The squares of all numbers of reduced gradients, each counted once: float32 [], on all devices."""

    def leaf(part: str, name: str, g: Array) -> Array:
        axes = [axis for axes in split(name, model, mesh) for axis in axes] + ["pipeline"] * (part == "moe")
        alike = mesh.size(*AXES) // mesh.size(*axes)
        return jnp.sum(jnp.square(g.astype(jnp.float32))) / alike

    return collectives.add(jnp.sum(jnp.stack(jax.tree.leaves(_named(leaf, gradients)))), AXES, mesh)


def optimizer_part(params: dict, model: Model, mesh: Mesh) -> dict:
    """The part of the parameters that this device's optimizer state belongs to."""
    if mesh.shard == "parameters":
        return params

    def leaf(_: str, name: str, w: Array) -> Array:
        lead = len(w.shape) - len(parameters.letters(name))
        for i, axes in enumerate(split(name, model, mesh)):
            stored = _storage(name, axes, i)
            size = w.shape[lead + i] // mesh.size(*stored)
            w = jax.lax.dynamic_slice_in_dim(w, collectives.index(stored, mesh) * size, size, lead + i)
        return w

    return _named(leaf, params)


def whole_params(params: dict, model: Model, mesh: Mesh) -> dict:
    """The inverse of `optimizer_part`."""
    if mesh.shard == "parameters":
        return params

    def leaf(_: str, name: str, w: Array) -> Array:
        lead = len(w.shape) - len(parameters.letters(name))
        for i, axes in enumerate(split(name, model, mesh)):
            w = collectives.gather(w, _storage(name, axes, i), lead + i, mesh)
        return w

    return _named(leaf, params)


def _storage(name: str, axes: Axes, dim: int) -> Axes:
    return tuple(axis for axis in axes if is_storage(name, axis, dim))


def _named(leaf: Callable[[str, str, Array], Any], tree: dict) -> dict:
    return {part: {name: leaf(part, name, x) for name, x in named.items()} for part, named in tree.items()}


def check_model(model: Model, mesh: Mesh) -> None:
    """Raises ValueError if the model cannot be laid over a mesh of these sizes."""
    param_specs(model, mesh)
    check(
        mesh.pipeline == 1 or model.moe_layers % mesh.pipeline == 0,
        f"mesh.pipeline ({mesh.pipeline}) must divide the {model.moe_layers} MoE layers into equal stages",
    )
    check(
        not model.moe_layers or mesh.expert == 1 or _fits(model.moe.n_group, mesh.expert),
        f"mesh.expert ({mesh.expert}) must divide the {model.moe.n_group} groups of experts, or be a multiple of them",
    )


def check_batch(rows: int, length: int, model: Model, mesh: Mesh, dropping: bool = True) -> None:
    """Raises ValueError if micro-batches of `rows` sequences of `length` cannot be laid over the mesh.

    Where nothing is dropped, as in evaluation, budgets set no bound.
    """
    devices = mesh.size(*BATCH)
    check(
        rows % devices == 0,
        f"the {rows} sequences of a micro-batch must be a multiple of mesh.data x mesh.fsdp x mesh.expert = {devices}",
    )
    parts = (2 * mesh.context if mesh.context > 1 else 1) * mesh.pipeline
    check(
        length % parts == 0,
        f"the length of a sequence ({length}) must be a multiple of {parts}, for mesh.context and mesh.pipeline",
    )
    m = model.moe
    together, shared = rows // mesh.size("data", "fsdp"), m.budget_sequences or rows
    check(
        not (dropping and model.moe_layers and m.capacity_factor) or together % shared == 0,
        f"{shared} sequences share a budget (moe.budget_sequences{'' if m.budget_sequences else ', 0: all'}), but only "
        f"{together} meet on the devices of the expert axis: set moe.budget_sequences to a divisor of {together}",
    )


def _fits(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0
