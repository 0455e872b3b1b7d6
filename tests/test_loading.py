"""Parameters in the engine's form, read matrix by matrix: the same numbers in less memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import MODELS, make_run

from dsv2_jax import hf, loading
from dsv2_jax.config import Compute, Mesh, Model
from dsv2_jax.inference import programs
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parameters import KEPT_FLOAT32

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["v2", "gqa"])
def folders(request, tmp_path_factory):
    """A run and its export."""
    base = tmp_path_factory.mktemp(request.param)
    make_run(base / "run", MODELS[request.param]())
    hf.export(base / "run", base / "hf")
    return base / "run", base / "hf"


def held(model: Model, params, compute: Compute, weights, mesh=None):
    setup = programs.Setup(model=model, compute=compute, form="compute", weights=weights, devices=mesh)
    return programs.prepare(params, setup)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("weights", ["compute", "int8", "float8"])
def test_the_engines_form_is_that_of_all_parameters_at_once(folders, weights):
    """From a run and from a Hugging Face folder, in bfloat16 and in 8 bits."""
    compute = Compute(dtype="bfloat16")
    for folder in folders:
        whole = loading.load(folder)
        wanted = held(whole.model, whole.params, compute, weights)
        loaded = loading.load_for_engine(folder, compute=compute, weights=weights)
        assert_same(loaded.params, wanted)
        assert held(loaded.model, loaded.params, compute, weights) is loaded.params  # the engine takes it as it is


def test_on_a_mesh_too(folders):
    sizes = Mesh(fsdp=1, data=2, tensor=2, expert=2)
    mesh = device_mesh.make(sizes)
    for folder in folders:
        whole = loading.load(folder, mesh)
        loaded = loading.load_for_engine(folder, mesh, compute=Compute(), weights="int8")
        assert_same(loaded.params, held(whole.model, whole.params, Compute(), "int8", mesh))


def test_a_forward_pass_needs_no_masters(folders):
    """Matrices in the dtype that the config computes in: training's own cast, done while they are read."""
    run, folder = folders
    settings = json.loads((run / "config.json").read_text())
    settings["compute"]["dtype"] = "bfloat16"
    (run / "config.json").write_text(json.dumps(settings))
    masters = loading.load(run).params
    for found in (loading.load(run, masters=False).params, hf.load_params(folder, dtype=jax.numpy.bfloat16)[1]):
        for part, named in masters.items():
            for name, w in named.items():
                kept = name.startswith(KEPT_FLOAT32)
                wanted = w if kept else w.astype(jax.numpy.bfloat16)
                assert found[part][name].dtype == wanted.dtype
                np.testing.assert_array_equal(np.asarray(found[part][name], np.float32), np.asarray(wanted, np.float32))


_MEASURE = """
import ctypes, gc, sys
from pathlib import Path
from dsv2_jax import loading
from dsv2_jax.config import Compute
from dsv2_jax.inference.engine import Capacity, Engine

def now(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

def serve():
    weights, compute = sys.argv[2], Compute(dtype=sys.argv[3])
    loaded = loading.load_for_engine(Path(sys.argv[1]), compute=compute, weights=weights)
    capacity = Capacity(rows=1, length=64, chunk=64, weights=weights)
    return Engine(loaded.params, loaded.model, compute=compute, capacity=capacity)

engine = serve()  # imports, threads and compiled programs stay
del engine
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = now("VmRSS")
engine = serve()
print(now("VmHWM") - before, engine.weight_bytes)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run and its export: 70 million parameters in many matrices, none of them a large part."""
    base, tiny = tmp_path_factory.mktemp("large"), MODELS["v2"]()
    moe = dataclasses.replace(tiny.moe, moe_intermediate_size=256, n_shared_experts=1)
    model = dataclasses.replace(tiny, hidden_size=256, num_hidden_layers=20, moe=moe)
    make_run(base / "run", model)
    hf.export(base / "run", base / "hf")
    return base


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("kind", "weights", "dtype"), [("run", "int8", "float32"), ("hf", "compute", "bfloat16")])
def test_reading_takes_little_more_memory_than_what_is_served(large, kind, weights, dtype):
    """Of the process, what malloc keeps aside: the files are of float32, which is four and two times as much."""
    environment = {**os.environ, "XLA_FLAGS": "", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(large / kind), weights, dtype],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, served = map(int, done.stdout.split())
    assert served > 60e6
    assert peak < 1.3 * served, f"{peak / 1e6:.0f} MB to serve {served / 1e6:.0f}"
