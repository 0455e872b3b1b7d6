"""Compares the paper's headline claims with this code: parameters, KV cache, cost of training and of generation."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsv2_jax.config import SINGLE, Attention, Model, Moe
from dsv2_jax.model import transformer
from dsv2_jax.ops import pages
from dsv2_jax.plan.compile import Topology
from dsv2_jax.plan.estimate import Estimate, Planner
from dsv2_jax.plan.fit import max_rows
from dsv2_jax.presets import layouts, models

_BITS, _DENSE_BITS = 6, 16  # per cached number: the quantised cache of section 3.2.3, and bfloat16 for the dense model
_SLOTS = 8  # tokens in the page that is counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the table."""

    what: str
    paper: str  # the paper's value
    ours: str  # this code's value, or "pending"
    how: str  # how the value is obtained


def cached_numbers(model: Model) -> int:
    """Numbers that the cache stores per token, counted from the arrays of one page."""
    page = pages.empty(model, SINGLE, 1, _SLOTS, "compute", jnp.dtype(jnp.bfloat16))
    return sum(x.size for layer in page for x in layer.values()) // _SLOTS


def parameters(model: Model) -> int:
    """Number of parameters, counted from the arrays of `transformer.init`."""
    tree = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def activated(model: Model) -> int:
    """Number of activated parameters per token: a model with only the chosen experts, without the embedding."""
    moe = dataclasses.replace(
        model.moe, n_routed_experts=model.moe.num_experts_per_tok, n_group=1, topk_group=1, budget_sequences=0
    )
    router = model.moe_layers * model.hidden_size * (model.moe.n_routed_experts - moe.n_routed_experts)
    embedding = model.vocab_size * model.hidden_size
    return parameters(dataclasses.replace(model, moe=moe)) + router - embedding


def claims(topology: Topology, serving: Topology, plan: Planner | None) -> list[Claim]:
    """The rows of the table, for training on `topology` and generation on `serving`.

    plan: compiles and estimates; None leaves the rows that need it pending.
    """
    return [*_sizes(), *_caches(), _training(topology, plan), _generation(serving, plan)]


def _sizes() -> list[Claim]:
    rows = []
    for name, model, paper in (
        ("DeepSeek-V2", models.v2(), "236B, 21B"),
        ("DeepSeek-V2-Lite", models.v2_lite(), "15.7B, 2.4B"),
    ):
        ours = f"{parameters(model) / 1e9:.2f}B, {activated(model) / 1e9:.2f}B"
        how = "counted from the initialised arrays; activated: with six routed experts, without the embedding"
        rows.append(Claim(what=f"{name}: parameters, activated", paper=paper, ours=ours, how=how))
    dense = f"{parameters(models.dense_67b()) / 1e9:.2f}B"
    return [
        *rows,
        Claim(what="dense baseline: parameters", paper="67B", ours=dense, how="counted from the initialised arrays"),
    ]


def _caches() -> list[Claim]:
    v2, dense = cached_numbers(models.v2()), cached_numbers(models.dense_67b())
    saved = 1 - v2 * _BITS / (dense * _DENSE_BITS)
    rows = [
        Claim(
            what="KV cache per token, V2 relative to the dense 67B",
            paper="-93.3%",
            ours=f"-{saved:.1%}",
            how=f"{v2:,} numbers at {_BITS} bits against {dense:,} at {_DENSE_BITS} bits; numbers counted from the "
            "cache arrays, bits from the paper",
        )
    ]
    for name, mla, layers, heads, paper in (
        ("16B", models.v2_lite(), 27, 16, "110.6K, 15.6K, 14%"),
        ("250B", models.v2(), 60, 56, "860.2K, 34.6K, 4%"),
    ):
        mha, ours = cached_numbers(_mha(layers, heads)), cached_numbers(mla)
        rows.append(
            Claim(
                what=f"Table 9, {name} MoE: numbers cached per token, MHA and MLA",
                paper=paper,
                ours=f"{mha / 1e3:.1f}K, {ours / 1e3:.1f}K, {ours / mha:.0%}",
                how=f"counted from the cache arrays; MHA with {layers} layers of {heads} heads",
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


def _training(topology: Topology, plan: Planner | None) -> Claim:
    ours = "pending"
    if plan is not None:
        hours = {}
        for name in ("v2", "dense_67b"):
            e = plan(layouts.on_topology(name, topology.name), topology, "step")
            hours[name] = 1e12 / e.tokens_per_second_per_chip / 3600 if e.time else math.inf
        saved = 1 - hours["v2"] / hours["dense_67b"]
        ours = f"{hours['v2'] / 1e3:.1f}K and {hours['dense_67b'] / 1e3:.1f}K: {-saved:.1%}"
    return Claim(
        what="chip hours per trillion tokens, V2 and the dense 67B",
        paper="172.8K and 300.6K (H800): -42.5%",
        ours=ours,
        how=f"estimated step time of both, compiled for {topology.name} with the layouts of configs/layouts.py",
    )


def _generation(topology: Topology, plan: Planner | None) -> Claim:
    ours, how = "pending", f"estimated decode steps with the most sequences that fit {topology.name}"
    if plan is not None:
        found = {name: _serving(name, topology, plan) for name in ("v2", "dense_67b")}
        rates = {name: e.tokens_per_second_per_chip for name, e in found.items()}
        ours = f"{rates['v2']:,.0f} and {rates['dense_67b']:,.0f} tokens/s per chip: "
        ours += f"{rates['v2'] / rates['dense_67b']:.2f} times"
        steps = [
            f"{e.sequences:,} of {e.length:,} tokens in {1e3 * e.time.step:.1f} ms" for e in found.values() if e.time
        ]
        how += f": {steps[0]} and {steps[1]}; weights and caches as in configs/layouts.py"
    return Claim(what="generation throughput, V2 and the dense 67B", paper="5.76 times", ours=ours, how=how)


def _serving(name: str, topology: Topology, plan: Planner) -> Estimate:
    layout = layouts.SERVING[name, topology.name]
    config = dataclasses.replace(layouts.on_topology(name, topology.name), mesh=layout.mesh)
    return max_rows(config, topology, layout.capacity, plan)[1]


def table(rows: list[Claim]) -> str:
    """The rows as a Markdown table."""
    fields = [field.name for field in dataclasses.fields(Claim)]
    lines = ["| claim | paper | ours | method |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(getattr(row, field) for field in fields) + " |" for row in rows)])
