"""The whole network: embedding, dense layers, MoE layers, head. Linen modules declare parameters; functions compute.

Layers of a kind are scanned over stacked parameters (training, evaluation), so that tracing and compiling cost the
same at any depth. Generation takes them unrolled, each with its own arrays: a scan would copy all of a layer's experts
to read the few that a token chose. So does training on CPU (see `arrange`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax import parameters
from dsv2_jax.config import AXES, SINGLE, Compute, Mesh, Model
from dsv2_jax.model import paged, rope
from dsv2_jax.model.attention import Where, attend
from dsv2_jax.model.layers import Kernels, cast, compute_dtype, declare, kernels, rms_norm, swiglu
from dsv2_jax.model.matmul import project
from dsv2_jax.model.moe import mixture
from dsv2_jax.parallel import collectives, context, pipeline, sharding
from dsv2_jax.parallel.mesh import platform

REMAT = {  # what the backward pass finds stored of a layer; all else it computes again
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}

_UNROLLED_LAYERS = 16  # in training on CPU, at most: a layer adds about 2 s of compilation


class Output(NamedTuple):
    """hidden_BTD: after the last norm, in the compute dtype. statistics: `mixture`'s, each with a leading L."""

    hidden_BTD: Array
    cache: paged.Cache | None
    statistics: dict[str, Array]


class Layer(nn.Module):
    """One pre-norm layer: attention, then a dense FFN or, when `sparse`, experts."""

    model: Model
    sparse: bool
    mesh: Mesh = SINGLE
    kernels: Kernels = "xla"
    index: int = 0  # among the layers of its kind, where they are unrolled

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        cache: paged.Layer | None,
        where: Where | paged.Where,
        exempt_B: Array | None,
        experts_BTK: Array | None,
    ) -> tuple[Array, tuple[paged.Layer | None, dict[str, Array]]]:
        """(x [B, T, D] behind the layer, (its cache, its statistics)). experts_BTK: see `router.route`."""
        p = declare(self, self.model, parameters.layer_names(self.model, self.sparse))
        p = sharding.gather(p, self.model, self.mesh)
        epsilon = self.model.rms_norm_eps
        with jax.named_scope("attention"):
            y_BTD, cache = attend(
                p, rms_norm(x_BTD, p["norm_attention_D"], epsilon), where, cache, self.model, self.mesh, self.kernels
            )
            x_BTD += y_BTD
        with jax.named_scope("ffn"):
            u_BTD = rms_norm(x_BTD, p["norm_ffn_D"], epsilon)
            if self.sparse:
                valid_BT = where.segments_BT > 0
                y_BTD, statistics = mixture(
                    p, u_BTD, valid_BT, exempt_B, self.model.moe, self.mesh, self.kernels, experts_BTK, self.index
                )
            else:
                y_BTD, statistics = swiglu(u_BTD, p["w_gate_DI"], p["w_up_DI"], p["w_down_ID"]), {}
                y_BTD = collectives.add(y_BTD, ("tensor",), self.mesh)
            return x_BTD + y_BTD, (cache, statistics)


class Embed(nn.Module):
    """Rows of the embedding table.

    Devices that hold columns of the table look up each other's tokens and swap: what travels is a row for every token,
    not the table, and back comes its gradient.
    """

    model: Model
    mesh: Mesh = SINGLE

    @nn.compact
    def __call__(self, tokens_BT: Array, dtype: Any) -> Array:
        table_WD = declare(self, self.model, ["w_embed_WD"])["w_embed_WD"]
        if self.mesh.shard == "optimizer":
            return table_WD[tokens_BT].astype(dtype)
        rows, columns = sharding.split("w_embed_WD", self.model, self.mesh)
        table_WD = collectives.gather(table_WD, rows, 0, self.mesh)
        tokens_N = collectives.gather(tokens_BT.reshape(-1), columns, 0, self.mesh)
        x_ND = collectives.swap(table_WD[tokens_N].astype(dtype), columns, 0, 1, self.mesh)
        return x_ND.reshape(*tokens_BT.shape, -1)


class Head(nn.Module):
    """The last norm; declares the output matrix, which `logits` and the chunked loss multiply by."""

    model: Model
    mesh: Mesh = SINGLE

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        p = declare(self, self.model, parameters.head_names(self.model))
        p = sharding.gather({"norm_D": p["norm_D"]}, self.model, self.mesh)
        return rms_norm(x_BTD, p["norm_D"], self.model.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V2. Its parameters are the tree of `parameters.tree`, or of `unstack` when `unrolled`."""

    model: Model
    compute: Compute = Compute()
    mesh: Mesh = SINGLE
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        exempt_B: Array | None = None,
        cache: paged.Cache | None = None,
        micro_batches: int = 1,
        experts_BTLK: Array | None = None,
    ) -> Output:
        """Runs tokens int32 at positions int32; a token attends earlier tokens of its segment (int32, 0 is padding).

        exempt_B bool: given in training only, then experts' budgets hold for all other sequences. cache: only when
        unrolled and with B = 1; the tokens are written where its plan says. micro_batches: how many follow each other
        in the rows, for a pipeline to work on; the result is then of this stage's part of the positions. experts_BTLK:
        those that tokens go to in each MoE layer, whatever its router says; not with a pipeline.
        """
        experts_LBTK = None if experts_BTLK is None else jnp.moveaxis(experts_BTLK, 2, 0)
        phases_BTR = rope.phases(self.model, positions_BT)
        where: Any = Where(phases_BTR, segments_BT, context.whole(segments_BT, self.mesh))
        if cache is not None:
            where = paged.Where(phases_BTR, segments_BT, cache.plan, cache.form, kernels(self.compute))
        x_BTD = Embed(self.model, self.mesh, name="embed")(tokens_BT, compute_dtype(self.compute))
        if self.unrolled:
            x_BTD, layers, statistics = self._unrolled(x_BTD, cache, where, exempt_B, experts_LBTK)
        else:
            assert cache is None, "a cache needs the unrolled form"
            x_BTD, layers, statistics = self._scanned(x_BTD, where, exempt_B, micro_batches, experts_LBTK)
        if cache is not None:
            cache = cache._replace(layers=layers)
        return Output(Head(self.model, self.mesh, name="head")(x_BTD), cache, statistics)

    def _kinds(self) -> list[tuple[str, int]]:
        return [(k, n) for k, n in (("dense", self.model.dense_layers), ("moe", self.model.moe_layers)) if n]

    def _scanned(
        self, x_BTD: Array, where: Where, exempt_B: Array | None, micro_batches: int, experts_LBTK: Array | None
    ) -> Any:
        statistics = {}
        for kind, count in self._kinds():
            layer = Layer(self.model, kind == "moe", self.mesh, kernels(self.compute), name=kind)
            if kind == "moe" and self.mesh.pipeline > 1:
                assert experts_LBTK is None, "a pipeline's routers choose for themselves"
                x_BTD, statistics = self._pipelined(layer, x_BTD, where, exempt_B, micro_batches)
            else:
                given = experts_LBTK if kind == "moe" else None
                x_BTD, statistics = self._scan(layer, x_BTD, where, exempt_B, count, given)
        return x_BTD, None, statistics

    def _scan(
        self,
        layer: Layer,
        x_BTD: Array,
        where: Where,
        exempt_B: Array | None,
        count: int,
        experts_LBTK: Array | None = None,
    ) -> Any:
        call = functools.partial(_scan_body, where=where, exempt_B=exempt_B)
        policy = REMAT[self.compute.remat]
        body = call if policy is None else nn.remat(call, policy=policy, prevent_cse=False)
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
        return scan(layer, x_BTD, experts_LBTK)

    def _pipelined(
        self, layer: Layer, x_BTD: Array, where: Where, exempt_B: Array | None, micro_batches: int
    ) -> tuple[Array, dict[str, Array]]:
        def apart(rows: Array) -> Array:
            return rows.reshape(micro_batches, -1, *rows.shape[1:])

        def stage(layer: Layer, x_BTD: Array, inputs: Any) -> tuple[Array, dict[str, Array]]:
            phases, segments_BT, segments_BS, exempt_B = inputs
            here = Where(phases, segments_BT, segments_BS)
            layers = self.model.moe_layers // self.mesh.pipeline
            x_BTD, statistics = self._scan(layer, x_BTD, here, exempt_B, layers)
            return x_BTD, {name: x for name, x in statistics.items() if name != "experts_BTK"}

        inputs = where.phases_BTR, where.segments_BT, where.segments_BS, exempt_B
        x_ABTD, sums = pipeline.run(stage, layer, apart(x_BTD), jax.tree.map(apart, inputs), self.mesh)
        statistics = {name: pipeline.all_layers(x / micro_batches, self.mesh) for name, x in sums.items()}
        return x_ABTD.reshape(-1, *x_ABTD.shape[2:]), statistics

    def _unrolled(
        self,
        x_BTD: Array,
        cache: paged.Cache | None,
        where: Any,
        exempt_B: Array | None,
        experts_LBTK: Array | None,
    ) -> Any:
        layers: list[paged.Layer | None] = []
        statistics: list[dict[str, Array]] = []
        names = [(kind, i) for kind, count in self._kinds() for i in range(count)]
        call: Any = functools.partial(_call, where=where, exempt_B=exempt_B)
        policy = REMAT[self.compute.remat]
        if policy is not None and cache is None:
            call = nn.remat(call, policy=policy)
        for index, (kind, i) in enumerate(names):
            layer = Layer(self.model, kind == "moe", self.mesh, kernels(self.compute), i, name=f"{kind}_{i}")
            before = cache.layers[index] if cache is not None else None
            given = experts_LBTK[i] if kind == "moe" and experts_LBTK is not None else None
            x_BTD, (after, figures) = call(layer, x_BTD, before, given)
            layers.append(after)
            statistics += [figures] if figures else []
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics) if statistics else {}
        return x_BTD, tuple(layers), stacked


def _call(
    layer: Layer,
    x_BTD: Array,
    cache: paged.Layer | None,
    experts_BTK: Array | None,
    *,
    where: Where,
    exempt_B: Array | None,
) -> Any:
    return layer(x_BTD, cache, where, exempt_B, experts_BTK)


def _scan_body(layer: Layer, x_BTD: Array, experts_BTK: Array | None, *, where: Where, exempt_B: Array | None) -> Any:
    x_BTD, (_cache, statistics) = layer(x_BTD, None, where, exempt_B, experts_BTK)
    return x_BTD, statistics


def init(model: Model, key: Array) -> Any:
    """Freshly drawn float32 parameters, the tree of `parameters.tree`."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Transformer(model, Compute(dtype="float32", remat="none")).init(key, one, one, one)["params"]


def forward(
    params: Any,
    batch: dict[str, Array],
    *,
    model: Model,
    compute: Compute,
    mesh: Mesh = SINGLE,
    exempt_B: Array | None = None,
    micro_batches: int = 1,
) -> Output:
    """The network over a packed batch {"tokens_BT", "positions_BT", "segments_BT"}; params cast by `layers.cast`.

    With "experts_BTLK" in the batch its tokens go to these. On a mesh it runs inside shard_map, on this device's part
    of the batch and its shards of the parameters. It runs unrolled if the parameters are unstacked.
    """
    inputs = (batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT"))
    unrolled = "dense_0" in params or "moe_0" in params
    return Transformer(model, compute, mesh, unrolled).apply(  # pyright: ignore
        {"params": params},
        *inputs,
        exempt_B=exempt_B,
        micro_batches=micro_batches,
        experts_BTLK=batch.get("experts_BTLK"),
    )


def forward_masters(
    params: Any,
    batch: dict[str, Array],
    *,
    model: Model,
    compute: Compute,
    mesh: Mesh = SINGLE,
    exempt_B: Array | None = None,
    micro_batches: int = 1,
) -> tuple[Output, Array]:
    """`forward` as every loss runs it, of float32 parameters as they lie between steps; and the head's whole matrix.

    That is w_head_DW in the compute dtype, or of a reward model w_score_D, float32.
    """
    operands = cast(arrange(params, model, mesh), compute_dtype(compute))
    out = forward(
        operands, batch, model=model, compute=compute, mesh=mesh, exempt_B=exempt_B, micro_batches=micro_batches
    )
    name = parameters.head_names(model)[-1]
    return out, sharding.gather({name: operands["head"][name]}, model, mesh)[name]


def logits(params: Any, hidden_BTD: Array) -> Array:
    """Unnormalised log-probabilities of the next token, [B, T, W] in the hidden states' dtype."""
    return project(hidden_BTD, params["head"]["w_head_DW"])


def arrange(params: Any, model: Model, mesh: Mesh = SINGLE) -> Any:
    """The parameters in the form that training is fastest with: unstacked on one CPU, if not too deep to compile so.

    There a scan copies every layer's parameters out of their stack, and activations and gradients into and out of
    theirs; in bfloat16 it also widens whole stacks. That is a third of a step.
    """
    alone = platform() == "cpu" and mesh.size(*AXES) == 1
    unrolls = alone and model.num_hidden_layers <= _UNROLLED_LAYERS
    return unstack(params) if unrolls else params


@jax.custom_vjp
def unstack(params: dict) -> dict:
    """The tree of the unrolled form: every layer's parameters as arrays of their own, under `moe_0`, `moe_1`, ..."""
    whole = {part: params[part] for part in ("embed", "head")}
    for kind in ("dense", "moe"):
        for i in range(len(next(iter(params.get(kind, {"": ()}).values())))):
            whole[f"{kind}_{i}"] = {name: stack[i] for name, stack in params[kind].items()}
    return whole


def _stack(_: None, whole: dict) -> tuple[dict]:
    """Gradients in the stacked form, each copied once: JAX's own would add up as many stacks as there are layers."""
    params = {part: whole[part] for part in ("embed", "head")}
    for kind in ("dense", "moe"):
        layers = [whole[f"{kind}_{i}"] for i in range(sum(part.startswith(kind) for part in whole))]
        if layers:
            params[kind] = jax.tree.map(lambda *leaves: jax.lax.optimization_barrier(jnp.stack(leaves)), *layers)
    return (params,)


unstack.defvjp(lambda params: (unstack(params), None), _stack)
