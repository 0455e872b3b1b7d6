"""What travels between the devices of the expert axis, read from programs compiled for real TPUs."""

import collections
import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import models
from dsv2_jax.config import Batch, Compute, Config, Mesh
from dsv2_jax.model.moe import RoutedTokens, mixture
from dsv2_jax.ops.cpu.experts import grouped_swiglu
from dsv2_jax.ops.switch import Execution
from dsv2_jax.parallel import expert
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.plan import program
from dsv2_jax.training.step import train_step

pytestmark = pytest.mark.tpu
MESH = Mesh(fsdp=1, expert=8)
MOE = dataclasses.replace(models.v2().moe, budget_sequences=8)  # 6 of 160 experts, in 3 of 8 groups
# Programs that leave gathers and scatters to the SparseCore cannot be printed.
READABLE = {
    "xla_tpu_offload_gather_to_sparsecore": False,
    "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
}
BYTES = {"bf16": 2, "f32": 4, "s32": 4}
TOKENS, WIDTH, INNER = 512, 5120, 128


def compiled(function, devices, arguments, specs):
    """The scheduled HLO of a function under shard_map on TPUs; every argument as ((shape, dtype), spec)."""
    mesh = device_mesh.make(MESH, devices)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=PartitionSpec("expert"), check_vma=False
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(arguments, specs, strict=True)
    ]
    return jax.jit(mapped).lower(*shapes).compile(READABLE).as_text()


def bytes_moved(hlo: str) -> int:
    """Bytes that can leave a device in all ragged all-to-alls: of operand and result, the smaller one."""
    total = 0
    for line in hlo.splitlines():
        found = re.search(r"= (.*?) ragged-all-to-all(-start)?\(", line)
        if not found:
            continue
        shapes = [
            (d, math.prod(map(int, s.split(",")))) for d, s in re.findall(r"(bf16|f32|s32)\[([\d,]+)\]", found[1])
        ]
        sizes = [BYTES[dtype] * count for dtype, count in shapes if count > 8]  # eight offsets and sizes are no data
        if not found[2]:
            operand = re.search(r"ragged-all-to-all\((\S+?)[,)]", line)
            assert operand
            source = re.search(
                rf"^\s*(?:ROOT )?{re.escape(operand[1])} = (bf16|f32|s32)\[([\d,]+)\]", hlo, re.MULTILINE
            )
            assert source, operand[1]
            sizes.append(BYTES[source[1]] * math.prod(map(int, source[2].split(","))))
        total += min(sizes)
    return total


def test_a_token_is_sent_at_most_once_to_a_device(tpus):
    """Half the bytes of one copy per (token, expert): M = 3 copies, not K = 6, each with a few more ids and gates."""

    def traffic(moe, tokens, choices):
        def dispatch(x_ND, experts_NK, gates_NK, w_gate, w_up, w_down):
            def experts(x, ids, gates):
                return grouped_swiglu(x, ids, gates, (w_gate, w_up, w_down))

            limits = expert.bounds(moe, MESH, 1, tokens, dropping=False)
            return expert.dispatch(x_ND, experts_NK, gates_NK, experts, limits, MESH)[0]

        split = PartitionSpec("expert")
        weights = [((160, *s), jnp.bfloat16) for s in ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))]
        arguments = [
            ((8 * tokens, WIDTH), jnp.bfloat16),
            ((8 * tokens, choices), jnp.int32),
            ((8 * tokens, choices), jnp.float32),
            *weights,
        ]
        return bytes_moved(compiled(dispatch, tpus("v5p:2x2x2"), arguments, [split] * 6))

    ours = traffic(MOE, TOKENS, 6)
    per_expert = traffic(dataclasses.replace(MOE, num_experts_per_tok=1, topk_group=1), 6 * TOKENS, 1)
    # A copy of every token: bfloat16 there and back, and a row of gates and ids, which a TPU pads to 128 float32.
    copy = TOKENS * (2 * WIDTH * 2 + 128 * 4)
    assert (ours, per_expert) == (3 * copy, 6 * copy)
    assert ours / per_expert <= 0.55


def test_shared_experts_run_while_tokens_travel(tpus):
    """In the schedule, the shared experts' products are between the start of a transfer and its end."""

    def layer(x_BTD, *weights):
        names = ("w_router_DE", "w_gate_EDF", "w_up_EDF", "w_down_EFD", "w_gate_DX", "w_up_DX", "w_down_XD")
        p = dict(zip(names, weights, strict=True))
        b, t = x_BTD.shape[:2]
        return mixture(p, x_BTD, RoutedTokens(jnp.ones((b, t), bool), jnp.zeros(b, bool)), MOE, Execution(MESH, "xla"))[
            0
        ]

    split, whole = PartitionSpec("expert"), PartitionSpec()
    shared = 2 * MOE.moe_intermediate_size
    bf16, f32 = jnp.bfloat16, jnp.float32
    arguments = [
        ((8, TOKENS, WIDTH), bf16),
        ((WIDTH, 160), f32),
        ((160, WIDTH, INNER), bf16),
        ((160, WIDTH, INNER), bf16),
        ((160, INNER, WIDTH), bf16),
        ((WIDTH, shared), bf16),
        ((WIDTH, shared), bf16),
        ((shared, WIDTH), bf16),
    ]
    specs = [split, whole, split, split, split, whole, whole, whole]
    lines = compiled(layer, tpus("v5p:2x2x2"), arguments, specs).splitlines()
    starts = [re.search(r"(%\S+) = \(\(bf16.* ragged-all-to-all-start\(", line) for line in lines]
    transfers = [(i, found[1]) for i, found in enumerate(starts) if found]
    assert len(transfers) == 2, "hidden states move once each way"
    for start, name in transfers:
        done = next(i for i, line in enumerate(lines) if f"ragged-all-to-all-done({name})" in line)
        beside = [line for line in lines[start:done] if "shared_experts/dot_general" in line]
        assert beside, f"nothing of the shared experts is scheduled inside {name}"


def test_a_training_step_compiles_for_a_pod(tpus):
    """Forward and backward, layers scanned and recomputed: the compiler accepts the scheduling groups.

    Attention and experts run on the Pallas kernels. Arrays of attention that the remat policy keeps are not recomputed.
    """
    tiny = models.tiny()
    mesh = Mesh(fsdp=2, expert=4, tensor=1)
    model = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, budget_sequences=4))
    config = Config(
        workdir=Path(),
        tokens=16 * 128,
        model=model,
        batch=Batch(size=16, length=128, micro_size=8),
        compute=Compute(dtype="bfloat16", remat="attention"),
        mesh=mesh,
    )
    devices = device_mesh.make(mesh, tpus("v5p:2x2x2"))
    state, batch = program.arguments(config, devices)
    compiled_step = train_step.lower(state, batch, 1e-3, config=config, mesh=devices).compile(READABLE)
    assert compiled_step.memory_analysis().temp_size_in_bytes > 0
    text = compiled_step.as_text()
    assert "ragged-all-to-all" in text
    names = re.findall(r'%(\w+?)_?(?:\.\d+)? = .*custom_call_target="tpu_custom_call"', text)
    layers = 2  # a dense layer and the scanned MoE layers
    assert collections.Counter(names) == {
        "latent_attention_forward": layers,
        "latent_attention_backward": layers,
        "gate_up": 2,  # forward, and computed again
        "gmm": 2,  # down, and the gradient of what gate and up read
        "hidden_gradient": 1,
        "tgmm": 2,
        "combine": 2,  # results, and the gradient of what experts read
    }
