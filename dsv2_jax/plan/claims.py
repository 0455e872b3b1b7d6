"""The paper's headline claims beside this code base: parameters, caches, the cost of training and of generation."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv2_jax.config import SINGLE, Attention, Config, Model, Moe
from dsv2_jax.model import transformer
from dsv2_jax.ops import pages
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.estimate import Estimate
from dsv2_jax.plan.largest import largest
from dsv2_jax.plan.program import Work
from dsv2_jax.presets import layouts, models

_BITS, _DENSE_BITS = 6, 16  # of a cached number: the paper's quantised cache (3.2.3), and the dense model's
_SLOTS = 8

Plan = Callable[[Config, Topology, Work], Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table."""

    what: str
    paper: str
    ours: str
    how: str


def cached_numbers(model: Model) -> int:
    """Numbers that one token leaves in the cache, counted in the arrays of one page."""
    page = pages.empty(model, SINGLE, 1, _SLOTS, "compute", jnp.dtype(jnp.bfloat16))
    return sum(x.size for layer in page for x in layer.values()) // _SLOTS


def parameters(model: Model) -> int:
    """Parameters of the tree that initialisation makes."""
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def activated(model: Model) -> int:
    """Parameters that a token is multiplied by: a model with only its chosen experts, without the embedding."""
    moe = dataclasses.replace(
        model.moe, n_routed_experts=model.moe.num_experts_per_tok, n_group=1, topk_group=1, budget_sequences=0
    )
    router = model.moe_layers * model.hidden_size * (model.moe.n_routed_experts - moe.n_routed_experts)
    embedding = model.vocab_size * model.hidden_size
    return parameters(dataclasses.replace(model, moe=moe)) + router - embedding


def claims(topology: Topology, serving: Topology, plan: Plan | None) -> list[Claim]:
    """The table, training on `topology` and generation on `serving`.

    plan: compiles a config's work and reads it; None: what needs that is pending.
    """
    return [*_sizes(), *_caches(), _training(topology, plan), _generation(serving, plan)]


def _sizes() -> list[Claim]:
    rows = []
    for name, model, paper in (
        ("DeepSeek-V2", models.v2(), "236B, 21B"),
        ("DeepSeek-V2-Lite", models.v2_lite(), "15.7B, 2.4B"),
    ):
        ours = f"{parameters(model) / 1e9:.2f}B, {activated(model) / 1e9:.2f}B"
        how = "arrays that initialisation makes; activated: the same with six experts, no embedding"
        rows.append(Claim(what=f"{name}: parameters, activated", paper=paper, ours=ours, how=how))
    dense = f"{parameters(models.dense_67b()) / 1e9:.2f}B"
    return [*rows, Claim(what="dense baseline: parameters", paper="67B", ours=dense, how="the same")]


def _caches() -> list[Claim]:
    v2, dense = cached_numbers(models.v2()), cached_numbers(models.dense_67b())
    saved = 1 - v2 * _BITS / (dense * _DENSE_BITS)
    rows = [
        Claim(
            what="KV cache of V2 against the dense 67B",
            paper="-93.3%",
            ours=f"-{saved:.1%}",
            how=f"{v2:,} numbers a token at {_BITS} bits against {dense:,} at {_DENSE_BITS}: numbers counted in cache "
            "arrays; the bits are the paper's",
        )
    ]
    for name, mla, layers, heads, paper in (
        ("16B", models.v2_lite(), 27, 16, "110.6K, 15.6K, 14%"),
        ("250B", models.v2(), 60, 56, "860.2K, 34.6K, 4%"),
    ):
        mha, ours = cached_numbers(_mha(layers, heads)), cached_numbers(mla)
        rows.append(
            Claim(
                what=f"Table 9, {name} MoE: numbers cached a token, MHA and MLA",
                paper=paper,
                ours=f"{mha / 1e3:.1f}K, {ours / 1e3:.1f}K, {ours / mha:.0%}",
                how=f"cache arrays; MHA with {layers} layers of {heads} heads",
            )
        )
    return rows


def _mha(layers: int, heads: int) -> Model:
    attention = Attention(
        kind="gqa",
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=0,
        kv_lora_rank=0,
        qk_nope_head_dim=0,
        qk_rope_head_dim=128,
    )
    return Model(num_hidden_layers=layers, attention=attention, moe=Moe(n_routed_experts=0))


def _training(topology: Topology, plan: Plan | None) -> Claim:
    ours = "pending"
    if plan is not None:
        hours = {}
        for name in ("v2", "dense_67b"):
            e = plan(layouts.on_topology(name, topology.name), topology, "step")
            hours[name] = 1e12 / e.tokens_per_second_per_chip / 3600 if e.time else math.inf
        saved = 1 - hours["v2"] / hours["dense_67b"]
        ours = f"{hours['v2'] / 1e3:.1f}K against {hours['dense_67b'] / 1e3:.1f}K: {-saved:.1%}"
    return Claim(
        what="chip hours per trillion tokens, V2 against the dense 67B",
        paper="172.8K against 300.6K (H800): -42.5%",
        ours=ours,
        how=f"estimated steps of both, compiled for {topology.name}, each in its layout of configs/layouts.py",
    )


def _generation(topology: Topology, plan: Plan | None) -> Claim:
    ours, how = "pending", f"the most sequences that fit {topology.name}, and estimated decode steps of the engine"
    if plan is not None:
        found = {name: _serving(name, topology, plan) for name in ("v2", "dense_67b")}
        rates = {name: e.tokens_per_second_per_chip for name, e in found.items()}
        ours = f"{rates['v2']:,.0f} against {rates['dense_67b']:,.0f} tokens/s a chip: "
        ours += f"{rates['v2'] / rates['dense_67b']:.2f} times"
        told = [
            f"{e.sequences:,} of {e.length:,} tokens in {1e3 * e.time.step:.1f} ms" for e in found.values() if e.time
        ]
        how += f", {told[0]} against {told[1]}; weights and caches as in configs/layouts.py"
    return Claim(what="generation throughput, V2 against the dense 67B", paper="5.76 times", ours=ours, how=how)


def _serving(name: str, topology: Topology, plan: Plan) -> Estimate:
    layout = layouts.SERVING[name, topology.name]
    config = dataclasses.replace(layouts.on_topology(name, topology.name), mesh=layout.mesh)
    return largest(config, topology, layout.capacity, plan)[1]


def show(rows: list[Claim]) -> str:
    """The table in Markdown."""
    fields = [field.name for field in dataclasses.fields(Claim)]
    lines = ["| claim | paper | ours | how obtained |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(getattr(row, field) for field in fields) + " |" for row in rows)])
