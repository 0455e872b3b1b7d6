"""The network: embedding, dense layers, MoE layers, head. Linen modules declare parameters; functions compute.

Training and evaluation scan layers of a kind over stacked parameters, so that tracing and compiling cost the same at
any depth. Generation unrolls them, each layer with its own arrays: a scan would copy all experts of a layer to read
the few that a token chose. Training on CPU unrolls shallow models, too (see `switch.unrolls`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax import parameters
from dsv2_jax.config import SINGLE, Compute, Mesh, Model
from dsv2_jax.model import rope
from dsv2_jax.model.attention import Tokens, attention
from dsv2_jax.model.layers import cast, declare, rms_norm, swiglu
from dsv2_jax.model.moe import RoutedTokens, mixture
from dsv2_jax.ops import switch
from dsv2_jax.ops.attention import PackedTokens, PagedTokens
from dsv2_jax.ops.matmul import project
from dsv2_jax.ops.pages import Cache, LayerPages
from dsv2_jax.ops.switch import Execution, compute_dtype
from dsv2_jax.parallel import collectives, context, pipeline, sharding
from dsv2_jax.parallel.mesh import PIPELINE, TENSOR

REMAT = {  # the activations of a layer that are kept for its backward pass, which recomputes all others
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


class Output(NamedTuple):
    """hidden_BTD: after the last norm, in the compute dtype. statistics: those of `mixture`, each with a leading L."""

    hidden_BTD: Array
    cache: Cache | None
    statistics: dict[str, Array]


class Layer(nn.Module):
    """One pre-norm layer: attention, then a dense FFN or, when `sparse`, experts."""

    model: Model
    sparse: bool
    run: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        cache: LayerPages | None,
        tokens: Tokens,
        exempt_B: Array | None,
        experts_BTK: Array | None,
    ) -> tuple[Array, tuple[LayerPages | None, dict[str, Array]]]:
        """(the layer's output [B, T, D], (its cache, its statistics)). exempt_B, experts_BTK: see `RoutedTokens`."""
        p = declare(self, self.model, parameters.layer_names(self.model, self.sparse))
        p = sharding.gather(p, self.model, self.run.mesh)
        epsilon = self.model.rms_norm_eps
        with jax.named_scope("attention"):
            h_BTD = rms_norm(x_BTD, p["norm_attention_D"], epsilon)
            u_BTD, cache = attention(p, h_BTD, tokens, cache, self.model, self.run)
            x_BTD += u_BTD
        with jax.named_scope("ffn"):
            h_BTD = rms_norm(x_BTD, p["norm_ffn_D"], epsilon)
            if self.sparse:
                routed = RoutedTokens(tokens.segments_BT > 0, exempt_B, experts_BTK)
                y_BTD, statistics = mixture(p, h_BTD, routed, self.model.moe, self.run)
            else:
                y_BTD, statistics = swiglu(h_BTD, p["w_gate_DI"], p["w_up_DI"], p["w_down_ID"]), {}
                y_BTD = collectives.add(y_BTD, TENSOR, self.run.mesh)
            return x_BTD + y_BTD, (cache, statistics)


class Embed(nn.Module):
    """Rows of the embedding table.

    Devices that hold columns of the table gather token ids, look up their columns, then all-to-all. Traffic is one row
    per token and one row of its gradient, not the table.
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
        x_ND = collectives.all_to_all(table_WD[tokens_N].astype(dtype), columns, 0, 1, self.mesh)
        return x_ND.reshape(*tokens_BT.shape, -1)


class Head(nn.Module):
    """The last norm. It also declares the output matrix that `logits` and the chunked loss use."""

    model: Model
    mesh: Mesh = SINGLE

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        p = declare(self, self.model, parameters.head_names(self.model))
        p = sharding.gather({"norm_D": p["norm_D"]}, self.model, self.mesh)
        return rms_norm(x_BTD, p["norm_D"], self.model.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V2. Its parameters are the tree of `parameters.tree`, or of `unstack`'s result if `unrolled`."""

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
        cache: Cache | None = None,
        micro_batches: int = 1,
        experts_BTLK: Array | None = None,
    ) -> Output:
        """The hidden states of tokens that attend to earlier tokens of their segment.

        Args:
          tokens_BT: int32.
          positions_BT: int32.
          segments_BT: int32; 0 is padding.
          exempt_B: bool, in training only: sequences whose tokens are not dropped.
          cache: Only when unrolled and with B = 1. The tokens are written to the slots of its placement.
          micro_batches: Consecutive micro-batches in the rows, for a pipeline. The result then holds this stage's part
            of the positions.
          experts_BTLK: The experts of each token in each MoE layer, in place of the router's; not with a pipeline.
        """
        experts_LBTK = None if experts_BTLK is None else jnp.moveaxis(experts_BTLK, 2, 0)
        phases_BTR = rope.phases(self.model, positions_BT)
        tokens: Any = PackedTokens(phases_BTR, segments_BT, context.gather(segments_BT, self.mesh))
        if cache is not None:
            tokens = PagedTokens(phases_BTR, segments_BT, cache.placement, cache.form)
        x_BTD = Embed(self.model, self.mesh, name="embed")(tokens_BT, compute_dtype(self.compute))
        if self.unrolled:
            x_BTD, layers, statistics = self._unrolled(x_BTD, cache, tokens, exempt_B, experts_LBTK)
        else:
            assert cache is None, "a cache needs the unrolled form"
            x_BTD, layers, statistics = self._scanned(x_BTD, tokens, exempt_B, micro_batches, experts_LBTK)
        if cache is not None:
            cache = cache._replace(layers=layers)
        return Output(Head(self.model, self.mesh, name="head")(x_BTD), cache, statistics)

    def _layer(self, kind: str, name: str, index: int = 0) -> Layer:
        run = Execution(self.mesh, switch.implementation(self.compute), index)
        return Layer(self.model, kind == "moe", run, name=name)

    def _kinds(self) -> list[tuple[str, int]]:
        return [(k, n) for k, n in (("dense", self.model.dense_layers), ("moe", self.model.moe_layers)) if n]

    def _scanned(
        self, x_BTD: Array, tokens: PackedTokens, exempt_B: Array | None, micro_batches: int, experts_LBTK: Array | None
    ) -> Any:
        statistics = {}
        for kind, count in self._kinds():
            layer = self._layer(kind, name=kind)
            if kind == "moe" and self.mesh.size(*PIPELINE) > 1:
                assert experts_LBTK is None, "a pipeline does not replay routing"
                x_BTD, statistics = self._pipelined(layer, x_BTD, tokens, exempt_B, micro_batches)
            else:
                given = experts_LBTK if kind == "moe" else None
                x_BTD, statistics = self._scan(layer, x_BTD, tokens, exempt_B, count, given)
        return x_BTD, None, statistics

    def _scan(
        self,
        layer: Layer,
        x_BTD: Array,
        tokens: PackedTokens,
        exempt_B: Array | None,
        count: int,
        experts_LBTK: Array | None = None,
    ) -> Any:
        call = functools.partial(_scan_body, tokens=tokens, exempt_B=exempt_B)
        policy = REMAT[self.compute.remat]
        body = call if policy is None else nn.remat(call, policy=policy, prevent_cse=False)
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=count)
        return scan(layer, x_BTD, experts_LBTK)

    def _pipelined(
        self, layer: Layer, x_BTD: Array, tokens: PackedTokens, exempt_B: Array | None, micro_batches: int
    ) -> tuple[Array, dict[str, Array]]:
        def split(rows: Array) -> Array:
            return rows.reshape(micro_batches, -1, *rows.shape[1:])

        def stage(layer: Layer, x_BTD: Array, inputs: Any) -> tuple[Array, dict[str, Array]]:
            phases, segments_BT, segments_BS, exempt_B = inputs
            micro = PackedTokens(phases, segments_BT, segments_BS)
            layers = self.model.moe_layers // self.mesh.size(*PIPELINE)
            x_BTD, statistics = self._scan(layer, x_BTD, micro, exempt_B, layers)
            return x_BTD, {name: x for name, x in statistics.items() if name != "experts_BTK"}

        inputs = tokens.phases_BTR, tokens.segments_BT, tokens.segments_BS, exempt_B
        x_ABTD, sums = pipeline.run(stage, layer, split(x_BTD), jax.tree.map(split, inputs), self.mesh)
        statistics = {name: pipeline.all_layers(x / micro_batches, self.mesh) for name, x in sums.items()}
        return x_ABTD.reshape(-1, *x_ABTD.shape[2:]), statistics

    def _unrolled(
        self,
        x_BTD: Array,
        cache: Cache | None,
        tokens: Tokens,
        exempt_B: Array | None,
        experts_LBTK: Array | None,
    ) -> Any:
        layers: list[LayerPages | None] = []
        statistics: list[dict[str, Array]] = []
        names = [(kind, i) for kind, count in self._kinds() for i in range(count)]
        call: Any = functools.partial(_call, tokens=tokens, exempt_B=exempt_B)
        policy = REMAT[self.compute.remat]
        if policy is not None and cache is None:
            call = nn.remat(call, policy=policy)
        for index, (kind, i) in enumerate(names):
            layer = self._layer(kind, name=f"{kind}_{i}", index=i)
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
    cache: LayerPages | None,
    experts_BTK: Array | None,
    *,
    tokens: Tokens,
    exempt_B: Array | None,
) -> Any:
    return layer(x_BTD, cache, tokens, exempt_B, experts_BTK)


def _scan_body(
    layer: Layer, x_BTD: Array, experts_BTK: Array | None, *, tokens: PackedTokens, exempt_B: Array | None
) -> Any:
    x_BTD, (_cache, statistics) = layer(x_BTD, None, tokens, exempt_B, experts_BTK)
    return x_BTD, statistics


def init(model: Model, key: Array) -> Any:
    """Randomly initialised float32 parameters, the tree of `parameters.tree`."""
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

    "experts_BTLK" in the batch replaces the routers' choice. On a mesh it runs inside shard_map, on this device's part
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
    """`forward` as every loss runs it, from the float32 parameters of the training state, and the head's matrix.

    The matrix is gathered: w_head_DW in the compute dtype, or a reward model's w_score_D, float32.
    """
    params = unstack(params) if switch.unrolls(model, mesh) else params
    operands = cast(params, compute_dtype(compute))
    out = forward(
        operands, batch, model=model, compute=compute, mesh=mesh, exempt_B=exempt_B, micro_batches=micro_batches
    )
    name = parameters.head_names(model)[-1]
    return out, sharding.gather({name: operands["head"][name]}, model, mesh)[name]


def logits(params: Any, hidden_BTD: Array) -> Array:
    """Unnormalised log-probabilities of the next token, [B, T, W] in the hidden states' dtype."""
    return project(hidden_BTD, params["head"]["w_head_DW"])


@jax.custom_vjp
def unstack(params: dict) -> dict:
    """The tree of the unrolled form: each layer has its own arrays, under `dense_0`, ..., `moe_0`, `moe_1`, ..."""
    unstacked = {part: params[part] for part in ("embed", "head")}
    for kind in ("dense", "moe"):
        for i in range(len(next(iter(params.get(kind, {"": ()}).values())))):
            unstacked[f"{kind}_{i}"] = {name: stack[i] for name, stack in params[kind].items()}
    return unstacked


def _stack(_: None, unstacked: dict) -> tuple[dict]:
    """Gradients in the stacked form, each copied once. JAX's own transpose would add one full stack per layer."""
    params = {part: unstacked[part] for part in ("embed", "head")}
    for kind in ("dense", "moe"):
        layers = [unstacked[f"{kind}_{i}"] for i in range(sum(part.startswith(kind) for part in unstacked))]
        if layers:
            params[kind] = jax.tree.map(lambda *leaves: jax.lax.optimization_barrier(jnp.stack(leaves)), *layers)
    return (params,)


unstack.defvjp(lambda params: (unstack(params), None), _stack)
