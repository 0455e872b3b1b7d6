"""The table from logical dimensions to mesh axes, and the shardings of parameters, gradients, state and batches.

A parameter is split in two ways. `tensor`, `expert` (over the experts' dimension) and `pipeline` (over layers) split
the computation: each device computes with its own part. All other splits are storage, as in ZeRO-3: a layer gathers the
parameters that it needs, and a reduce-scatter returns their gradients.
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
from dsv2_jax.parallel.mesh import BATCH, CONTEXT, EXPERT, PIPELINE, STORAGE, TENSOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axes that split each logical dimension, the outermost first.

    Within a parameter an axis splits the first dimension that lists it. An axis that only splits storage is left out
    where it does not divide the dimension, which costs memory but not correctness.
    """

    batch: Axes = BATCH
    time: Axes = CONTEXT
    layers: Axes = PIPELINE
    experts: Axes = EXPERT
    model: Axes = STORAGE
    query_latent: Axes = STORAGE
    kv_latent: Axes = STORAGE
    heads: Axes = (*TENSOR, *EXPERT)
    kv_heads: Axes = TENSOR
    vocabulary: Axes = (*TENSOR, *EXPERT)
    dense_width: Axes = (*TENSOR, *EXPERT)
    shared_width: Axes = (*TENSOR, *EXPERT)
    expert_width: Axes = TENSOR
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
        """The axes of a logical dimension. Raises ValueError for a dimension that is not in the table."""
        check(dim in {field.name for field in dataclasses.fields(self)}, f"no sharding rule for the dimension {dim}")
        return getattr(self, dim)


RULES = Rules()


def is_storage(name: str, axis: str, dim: int) -> bool:
    """Whether `axis` over dimension `dim` of a layer's parameter splits its storage and not the computation."""
    if axis in TENSOR:
        return name == "w_embed_WD"  # rows are looked up, not multiplied
    return not (axis in EXPERT and dim == 0 and parameters.per_expert(name))


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
    """The spec of `params[part][name]`; without `stored`, only the axes that split the computation."""
    dims = [
        tuple(axis for axis in axes if stored or not is_storage(name, axis, i))
        for i, axes in enumerate(split(name, model, mesh))
    ]
    if part in ("dense", "moe"):
        pipeline = RULES.layers if part == "moe" and mesh.size(*PIPELINE) > 1 else ()
        dims.insert(0, pipeline)
    return PartitionSpec(*(axes or None for axes in dims))


def param_specs(model: Model, mesh: Mesh) -> dict:
    """Specs of the tree of `parameters.tree` between steps."""
    stored = mesh.shard == "parameters"
    return _specs(model, mesh, stored)


def optimizer_specs(model: Model, mesh: Mesh) -> dict:
    """Specs of one moment of the optimizer: split over all axes, also where parameters are replicated (ZeRO-1)."""
    return _specs(model, mesh, stored=True)


def _specs(model: Model, mesh: Mesh, stored: bool) -> dict:
    tree = parameters.tree(model)
    return {part: {name: spec(part, name, model, mesh, stored=stored) for name in tree[part]} for part in tree}


def batch_spec(name: str) -> PartitionSpec:
    """The spec of a batch's leaf with leading micro-batches A, such as [A, B, T] for `tokens_BT`.

    Dimensions after sequences and time are not split.
    """
    return PartitionSpec(None, *(RULES.axes(dim) for dim in parameters.dims(name)[:2]))


def on(mesh: jax.sharding.Mesh | None, specs: Any) -> Any:
    """Specs as shardings of this mesh; without a mesh, the first device."""

    def leaf(spec: PartitionSpec) -> jax.sharding.Sharding:
        return NamedSharding(mesh, spec) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])

    return jax.tree.map(leaf, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def gather(p: dict[str, Array], model: Model, mesh: Mesh) -> dict[str, Array]:
    """One layer's parameters with their storage splits gathered, as the layer computes with them."""
    if mesh.shard == "optimizer":
        return p
    gathered = {}
    for name, w in p.items():
        for i, axes in enumerate(split(name, model, mesh)):
            w = collectives.gather(w, _storage(name, axes, i), i, mesh)
        gathered[name] = w
    return gathered


def reduce_gradients(gradients: dict, model: Model, mesh: Mesh) -> dict:
    """The optimizer's shards of the gradient, given each device's gradients, which are parts of a sum."""

    def leaf(part: str, name: str, g: Array) -> Array:
        lead = len(g.shape) - len(parameters.letters(name))
        splits = split(name, model, mesh)
        if mesh.shard == "optimizer":
            for i, axes in enumerate(splits):
                g = collectives.scatter(g, _storage(name, axes, i), lead + i, mesh)
        split_over = {axis for axes in splits for axis in axes} | (set(RULES.layers) if part == "moe" else set())
        return collectives.add(g, tuple(axis for axis in AXES if axis not in split_over), mesh)

    return _named(leaf, gradients)


def sum_of_squares(gradients: dict, model: Model, mesh: Mesh) -> Array:
    """The sum of squares of reduced gradients, each element counted once: float32 [], on all devices."""

    def leaf(part: str, name: str, g: Array) -> Array:
        axes = [axis for axes in split(name, model, mesh) for axis in axes] + [*RULES.layers] * (part == "moe")
        copies = mesh.size(*AXES) // mesh.size(*axes)
        return jnp.sum(jnp.square(g.astype(jnp.float32))) / copies

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


def gather_params(params: dict, model: Model, mesh: Mesh) -> dict:
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
    """Raises ValueError if a mesh of these sizes cannot hold the model."""
    param_specs(model, mesh)
    check(
        model.moe_layers % mesh.size(*PIPELINE) == 0,
        f"mesh.pipeline ({mesh.pipeline}) must divide the {model.moe_layers} MoE layers into equal stages",
    )
    check(
        not model.moe_layers or mesh.expert == 1 or _divides(model.moe.n_group, mesh.expert),
        f"mesh.expert ({mesh.expert}) must divide the {model.moe.n_group} groups of experts, or be a multiple of them",
    )


def check_batch(rows: int, length: int, model: Model, mesh: Mesh, dropping: bool = True) -> None:
    """Raises ValueError if the mesh cannot hold micro-batches of `rows` sequences of `length` tokens.

    The check of budgets applies only with `dropping`, not in evaluation.
    """
    devices, names = mesh.size(*BATCH), " x ".join(f"mesh.{axis}" for axis in BATCH)
    check(
        rows % devices == 0,
        f"the {rows} sequences of a micro-batch must be a multiple of {names} = {devices}",
    )
    contexts, axes = mesh.size(*CONTEXT), (*CONTEXT, *PIPELINE)
    parts = (2 * contexts if contexts > 1 else 1) * mesh.size(*PIPELINE)
    check(
        length % parts == 0,
        f"the length of a sequence ({length}) must be a multiple of {parts}, for "
        f"{' and '.join(f'mesh.{axis}' for axis in axes)}",
    )
    m = model.moe
    together = rows // mesh.size(*(axis for axis in BATCH if axis not in RULES.experts))
    shared = m.budget_sequences or rows
    check(
        not (dropping and model.moe_layers and m.capacity_factor) or together % shared == 0,
        f"{shared} sequences share a budget (moe.budget_sequences{'' if m.budget_sequences else ', 0: all'}), but only "
        f"{together} meet on the devices of the expert axis: set moe.budget_sequences to a divisor of {together}",
    )


def _divides(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0
