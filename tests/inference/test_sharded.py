"""The engine on a mesh: sequences over data and expert, heads over tensor; the tokens of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from test_engine import GOLDEN, requests
from tiny import gqa, random_params

from dsv2_jax.config import Compute, Mesh
from dsv2_jax.hf import load_params
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding

pytestmark = pytest.mark.slow

COMPUTE = Compute(dtype="float32", remat="none")
CAPACITY = Capacity(rows=2, length=128, chunk=64, page=16)
MESHES = {"data+expert+tensor": Mesh(fsdp=1, data=2, expert=2, tensor=2), "expert": Mesh(fsdp=1, expert=8)}


def compare(model, params, wanted, sizes: Mesh) -> None:
    """Tokens, and log-probabilities up to rounding; every replica has had work, and all pages are free again."""
    mesh = device_mesh.make(sizes)
    alone = Engine(params, model, compute=COMPUTE, capacity=CAPACITY).generate(wanted)
    laid = jax.device_put(params, sharding.on(mesh, sharding.param_specs(model, device_mesh.sizes(mesh))))
    spread = Engine(laid, model, compute=COMPUTE, capacity=CAPACITY, mesh=mesh)
    ids = [spread.add(request) for request in wanted]
    assert len(spread.replicas) == sizes.size(*device_mesh.BATCH)
    assert all(replica.waiting for replica in spread.replicas)
    for id in ids:
        spread.cancel(id)
    found = spread.generate(wanted)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    for mine, theirs in zip(found, alone, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
        np.testing.assert_allclose([p for p, _ in mine.scores], [p for p, _ in theirs.scores], atol=1e-4)
    assert all(replica.pages.held == 0 for replica in spread.replicas)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_tokens_of_one_device(name):
    model, params = load_params(GOLDEN)
    wanted = requests(6) + requests(5, seed=1, sampling=Sampling(temperature=1.0, top_k=50), score_from=1)
    wanted.append(Request(prompt=(5, 6, 7), max_new=6, sampling=Sampling(repetition_penalty=1.5), top=4))
    compare(model, params, wanted, MESHES[name])


def test_heads_of_keys_and_values_over_tensor():
    model = dataclasses.replace(gqa(), vocab_size=160)
    compare(model, jax.tree.map(jax.numpy.asarray, random_params(model)), requests(9), Mesh(fsdp=1, data=4, tensor=2))
