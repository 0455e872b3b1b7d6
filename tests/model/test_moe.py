"""The MoE layer with tokens sent to other devices, compared with the same layer on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import models
from dsv2_jax.config import SINGLE, Mesh
from dsv2_jax.model.moe import RoutedTokens, mixture
from dsv2_jax.ops.switch import Execution
from dsv2_jax.parallel import mesh as device_mesh

B, T, D, F = 8, 8, 16, 8
MOE = dataclasses.replace(models.tiny().moe, n_routed_experts=16, n_group=8, topk_group=2, num_experts_per_tok=2)
EXPERTS = {"w_gate_EDF": (16, D, F), "w_up_EDF": (16, D, F), "w_down_EFD": (16, F, D)}
OTHERS = {"w_router_DE": (D, 16), "w_gate_DX": (D, F), "w_up_DX": (D, F), "w_down_XD": (F, D)}


@pytest.mark.parametrize("padded", [0, 3], ids=["whole rows", "padding that goes nowhere"])
def test_unwritten_rows_are_never_read(padded):
    """Few pairs per expert, so that blocks of rows include memory after the received rows, which is NaN on CPU."""
    rng = np.random.default_rng(0)
    # By fan-in: gradients in the hundreds would round by more than the bound where they cancel.
    p = {name: jnp.asarray(rng.normal(size=s) / s[-2] ** 0.5, jnp.float32) for name, s in (EXPERTS | OTHERS).items()}
    x_BTD, weight_BTD = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    valid_BT = jnp.broadcast_to(jnp.arange(T) < T - padded, (B, T))

    def gradients(mesh, p, x, valid, weight):
        def value(p, x):
            return jnp.vdot(mixture(p, x, RoutedTokens(valid), MOE, Execution(mesh))[0], weight)

        dp, dx = jax.grad(value, argnums=(0, 1))(p, x)
        return {name: dp[name] for name in EXPERTS}, dx

    mesh = Mesh(fsdp=1, expert=8)
    split, whole = PartitionSpec("expert"), PartitionSpec()
    specs = dict.fromkeys(EXPERTS, split) | dict.fromkeys(OTHERS, whole)
    ours_p, ours_x = jax.jit(
        jax.shard_map(
            lambda *arguments: gradients(mesh, *arguments),
            mesh=device_mesh.make(mesh, jax.devices()[:8]),
            in_specs=(specs, split, split, split),
            out_specs=split,
            check_vma=False,
        )
    )(p, x_BTD, valid_BT, weight_BTD)
    alone_p, alone_x = jax.jit(functools.partial(gradients, SINGLE))(p, x_BTD, valid_BT, weight_BTD)
    np.testing.assert_allclose(ours_x, alone_x, rtol=1e-5, atol=1e-5)
    for name in EXPERTS:
        np.testing.assert_allclose(ours_p[name], alone_p[name], rtol=1e-5, atol=1e-5)
