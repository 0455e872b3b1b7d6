"""Fixtures that all tests share; JAX on 8 virtual CPU devices with a compilation cache, and TPUs to compile for."""

import contextlib
import ctypes
import functools
import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

# Programs for CPUs are compiled without optimisation: at these sizes that takes longer than they run.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# jaxlib 0.10's older fusion emitters halve the remaining time. jaxlib 0.12 lacks them and exits on this flag.
_OLDER_FUSION = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
COMPILE_FAST = f"{_FLAGS} {_OLDER_FUSION}" if version("jaxlib").startswith("0.10.") else _FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # torch: threads of two workers would wait for each other at every product

# libtpu describes and compiles for TPUs that are not there, if nothing makes it look for them.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def _start_jax() -> None:
    """JAX reads the flags once, when it initialises its devices. libtpu exits on XLA_FLAGS that it does not know."""
    import jax

    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {COMPILE_FAST}"
    jax.devices()
    os.environ["XLA_FLAGS"] = f"{given} {_FLAGS}"


_start_jax()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the compiled programs of a file after its last test: those of the full suite do not fit in memory."""
    yield
    _forget()


@pytest.fixture
def forget_each():
    """Drops them after every test, for files whose tests compile large programs of their own."""
    yield
    _forget()


def _forget() -> None:
    import jax

    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone knows it
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def tpus():
    """tpus("v5p:2x2x2"): descriptions of the TPU devices of a slice, to compile programs for, not to run them."""
    from jax.experimental import topologies

    return functools.cache(lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
