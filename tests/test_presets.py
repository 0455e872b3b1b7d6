"""Every preset takes a step: at its full size in shapes, and one of each kind, shrunk, for real."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import random_params

from configs import PRESETS, layouts
from dsv2_jax import train
from dsv2_jax.alignment import policy, reward, sampler, verifiers
from dsv2_jax.config import AXES, SINGLE, Config, Data, Mesh
from dsv2_jax.data import corpora, tokenizer
from dsv2_jax.inference.request import Request
from dsv2_jax.parallel import sharding
from dsv2_jax.parallel.mesh import BATCH
from dsv2_jax.plan import program
from dsv2_jax.training import checkpoint, run_folder
from dsv2_jax.training.loss import loss
from dsv2_jax.training.step import train_step

DEVICES, WORDS, LENGTH = 8, 384, 64
MESHES = {"v2_sft": Mesh(fsdp=32, expert=8), "v2_lite_long": Mesh(fsdp=8, expert=8)}  # of those without a layout
LINES = {
    "text": [f"User: {n}+{n}\n\nAssistant: {2 * n}. That is all there is to say of {n}." for n in range(200)],
    "conversations": [
        {"messages": [{"role": "user", "content": f"{n}+{n}"}, {"role": "assistant", "content": str(2 * n)}]}
        for n in range(200)
    ],
    "preferences": [{"prompt": f"{n}+{n}", "chosen": str(2 * n), "rejected": str(n)} for n in range(200)],
    "prompts": [{"prompt": f"{n}+{n}", "answer": f"${2 * n}$", "pattern": r"\d+", "task": "x"} for n in range(200)],
}


def shrunk(config: Config, folder) -> Config:
    """The preset small enough for a test: widths and numbers are others, lengths keep their proportions.

    Lengths of rows, positions and answers are divided by the same number: what did not fit does not fit here either.
    """
    shortest = 512 if config.data.retrieval_share else LENGTH  # a fact and its question take more
    model, k = config.model, max(1, config.batch.length // shortest)
    wide = model.attention.kind == "mla"
    attention = dataclasses.replace(
        model.attention,
        num_attention_heads=8,
        num_key_value_heads=0 if wide else 2,
        q_lora_rank=24 if model.attention.q_lora_rank else 0,
        kv_lora_rank=16 if wide else 0,
        qk_nope_head_dim=8 if wide else 0,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    moe = dataclasses.replace(
        model.moe,
        n_routed_experts=16 if model.moe.n_routed_experts else 0,
        num_experts_per_tok=4,
        moe_intermediate_size=16,
        budget_sequences=1,
    )
    rope = dataclasses.replace(
        model.rope, original_max_position_embeddings=model.rope.original_max_position_embeddings // k
    )
    model = dataclasses.replace(
        model, vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, intermediate_size=48, attention=attention,
        moe=moe, rope=rope, max_position_embeddings=model.max_position_embeddings // k,
        first_k_dense_replace=min(1, model.first_k_dense_replace),
    )  # fmt: skip
    unit, batch, g = config.batch.micro_size or config.batch.size, config.batch, config.grpo
    batch = dataclasses.replace(
        batch,
        length=batch.length // k,
        **{name: getattr(batch, name) * DEVICES // unit for name in ("size", "micro_size", "ramp_from")},
    )
    if g.group:
        sampled = g.prompts * g.group * DEVICES // unit
        g = dataclasses.replace(
            g, group=2, prompts=sampled // 2, max_new=-(-g.max_new // k), steps=g.passes * sampled // batch.size,
            evaluate_prompts=4,
        )  # fmt: skip
    source = folder / "data" / f"{config.data.form}.{'txt' if config.data.form == 'text' else 'jsonl'}"
    return dataclasses.replace(
        config,
        workdir=folder / "run",
        tokens=batch.size * batch.length,
        epochs=0,
        model=model,
        batch=batch,
        data=dataclasses.replace(config.data, source=str(source), tasks=(), fetch=False, folder=folder / "prepared"),
        grpo=g,
    )


@pytest.fixture
def sources(tmp_path):
    """Small files of every form."""
    folder = tmp_path / "data"
    folder.mkdir()
    for form, lines in LINES.items():
        if form == "text":
            (folder / "text.txt").write_text("\n\n".join(lines))
        else:
            (folder / f"{form}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def saved(run, config):
    """A checkpoint of drawn parameters, with a tokenizer of the small text."""
    data = Data(source=str(run.parent / "data" / "text.txt"), folder=run.parent / "prepared")
    words = tokenizer.for_config(data, WORDS, corpora.prepare(data))
    params = jax.tree.map(jnp.asarray, random_params(config.model))
    checkpoint.save_params(run, dataclasses.replace(config, init=None), params)
    run_folder.keep_tokenizer(run, words.save)
    return run


# One of each model and stage: pretraining, longer contexts, fine-tuning, rewards, and GRPO with each kind of reward.
SHRUNK = ("v2", "dense_67b", "nano_long", "v2_lite_long", "v2_sft", "nano_reward", "v2_grpo_reasoning",
          "v2_grpo_preference")  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("forget_each")
@pytest.mark.parametrize("name", SHRUNK)
def test_a_shrunk_preset_takes_a_step(name, sources):
    config = shrunk(PRESETS[name](), sources)
    if name.split("_")[-1] in ("sft", "reward", "long") or config.grpo.group:
        base = dataclasses.replace(config, model=dataclasses.replace(config.model, head="tokens"))
        config = dataclasses.replace(config, init=saved(sources / "base", base))
    if config.grpo.group:
        scoring = dataclasses.replace(config, model=dataclasses.replace(config.model, head="score"))
        known = {"task": "form"}  # a reward of reasoning-gym's own items
        rewards = tuple(
            known.get(r, r) if r in verifiers.REWARDS else str(saved(sources / r.replace("/", "-"), scoring))
            for r in config.grpo.rewards
        )
        config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, rewards=rewards))
    outcome = train.train(config)
    assert outcome.finished
    ramp = config.batch.size // (config.batch.ramp_from or config.batch.size)
    assert outcome.progress.step == (config.grpo.steps if config.grpo.group else ramp)


def laid_out(name: str) -> Config:
    """The preset at its full size, in its layout, or on the mesh of `MESHES`."""
    topology = next((slice_ for preset, slice_ in layouts.LAYOUTS if preset == name), "")
    config = layouts.on_topology(name, topology)
    devices = math.prod(map(int, topology.split(":")[1].split("x"))) if topology else 0
    return dataclasses.replace(config, mesh=config.mesh.resolve(devices) if topology else MESHES.get(name, SINGLE))


@pytest.mark.parametrize("name", PRESETS)
def test_a_full_preset_fits_its_mesh_and_its_engine(name):
    config = laid_out(name)
    sharding.check_model(config.model, config.mesh)
    sharding.check_batch(config.batch.micro_size or config.batch.size, config.batch.length, config.model, config.mesh)
    if config.grpo.group:
        g, lanes = config.grpo, config.mesh.size(*BATCH)
        for how in ("pallas", "xla"):
            capacity = sampler.capacity(config, how).resolve(config.model, how)
            assert capacity.rows == min(64, -(-g.prompts * g.group // lanes))
            longest = Request(prompt=(0,) * (config.batch.length - g.max_new), max_new=g.max_new)
            longest.check(config.model, capacity.length)


@pytest.mark.slow
@pytest.mark.usefixtures("forget_each")
@pytest.mark.parametrize("name", PRESETS)
def test_a_full_preset_takes_a_step_in_shapes(name):
    """On an abstract mesh, without devices."""
    config = laid_out(name)
    mesh: Any = jax.sharding.AbstractMesh(tuple(config.mesh.sizes().values()), AXES)
    state, batch = program.arguments(config, mesh)
    own = policy.loss if config.grpo.group else reward.loss if config.model.head == "score" else loss
    if own is reward.loss:
        batch = {name: batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT", "weights_BT")} | {
            "pairs_BT": batch["tokens_BT"], "ends_BT": batch["weights_BT"], "values_BT": batch["weights_BT"],
        }  # fmt: skip
    after, metrics = jax.eval_shape(
        lambda s, b: train_step(s, b, 1e-3, config=config, loss=own, mesh=mesh), state, batch
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
