"""Memory of a GRPO iteration: phases added up by hand with a fake compiler, and one compiled for a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import layouts
from dsv2_jax.inference.engine import Capacity
from dsv2_jax.plan import fit, report
from dsv2_jax.plan.compile import Topology, laid_out
from dsv2_jax.plan.estimate import estimate
from dsv2_jax.plan.program import CompiledProgram

GIB = 2**30
SLICE = Topology("v5p:4x8x8")
USED = {"weights": 45, "decode": 41, "step": 24}


def planned(config, topology, work):
    """A fake compiler: parameters of 3 GiB, moments of 7, a cache of 1 and peaks as in USED."""
    name = work if isinstance(work, str) else "decode"
    program = CompiledProgram(
        fits=True,
        used=USED[name] * GIB,
        limit=0,
        parameters=38 * GIB if name == "decode" else 3 * GIB,
        optimizer=7 * GIB if name == "step" else 0,
        cache=GIB if name == "decode" else 0,
        batch=0,
        gradients=0,
        coords=(),
        seconds=0,
        host_bytes=0,
    )
    return estimate(laid_out(config, topology, work), topology, program, "", work=work)


@pytest.mark.parametrize(("name", "resident"), [("v2_grpo_reasoning", (4, 6, 4)), ("v2_grpo_preference", (10, 12, 10))])
def test_phases_by_hand(name, resident):
    """The reference and each of two reward models take 3 GiB; moments of 7 GiB are offloaded to the host."""
    config = layouts.on_topology(name, SLICE.name)
    works = []

    def plan(config, topology, work):
        works.append(work)
        return planned(config, topology, work)

    iteration = fit.grpo_iteration(config, SLICE, plan)
    assert [phase.peak // GIB for phase in iteration.phases] == [
        used + held for used, held in zip(USED.values(), resident, strict=True)
    ]
    assert iteration.fits
    (capacity,) = (work for work in works if isinstance(work, Capacity))
    assert (capacity.rows, capacity.length) == (4, 4096)  # 1024 responses on 256 groups of devices
    assert "sampling" in report.grpo_table(iteration) and fit.figures(iteration)["fits"]


@pytest.mark.tpu
def test_command_plans_a_small_iteration(tmp_path):
    """The sampler's weights have the sharding of generation, the update's parameters that of training."""
    command = [sys.executable, "-m", "dsv2_jax.plan", "nano_grpo", "--topology", "v5p:2x2x1", "--json"]
    command += [str(tmp_path / "plan.json"), "--mesh.fsdp", "2", "--mesh.expert", "2"]
    command += ["--model.moe.budget_sequences", "1"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and [phase["name"] for phase in found["phases"]] == [
        "preparing weights", "sampling", "updating",
    ]  # fmt: skip
    masters, moments = (found["updating"]["memory"][name] for name in ("parameters", "optimizer"))
    assert moments == pytest.approx(2 * masters, rel=0.01)
    assert found["phases"][1]["resident"] == {"reference": masters, "reward models": 0, "optimizer": moments,
                                            "masters": masters}  # fmt: skip
    assert found["preparing"]["memory"]["peak"] > masters + found["sampling"]["memory"]["parameters"] / 2
