"""Options of the TPU's compiler that all programs are compiled with, here and for TPUs that are not there."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Option:
    """A value, and the versions of libtpu that are known to take it: one that does not know it ends the process.

    The default range was checked with 0.0.42.1, 0.0.50.1 and 0.0.52: those of jax 0.10.2, 0.12.0 and the newest one.
    """

    value: bool
    since: tuple[int, ...] = (0, 0, 42)
    before: tuple[int, ...] = (0, 0, 53)


OPTIONS = {
    # The SparseCores run gathers of weights, scatters of gradients and sums beside the TensorCore: on the chips that
    # have them nothing else makes these asynchronous. Over several dimensions of the torus they stay true scatters.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": Option(True),
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": Option(True),
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": Option(True),
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": Option(True),
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": Option(True),
    "xla_tpu_enable_all_gather_offload_tracing": Option(True),
    "xla_tpu_enable_reduce_scatter_offload_tracing": Option(True),
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": Option(False),
    "xla_tpu_use_tc_device_shape_on_sc": Option(True),
    "xla_sc_disable_megacore_partitioning": Option(True),
    # Gathers and scatters of rows stay on the TensorCore: the SparseCores are busy, and in a program that leaves them
    # to these nothing of their time can be read.
    "xla_tpu_offload_gather_to_sparsecore": Option(False),
    "xla_tpu_enable_offloading_scatter_to_sparsecore": Option(False),
}


def options() -> dict[str, bool]:
    """The options that the installed libtpu is known to take."""
    version = _version()
    return {name: option.value for name, option in OPTIONS.items() if option.since <= version < option.before}


def left_out() -> str:
    """A sentence on the options that the installed libtpu is not known to take; empty if there are none."""
    unknown = len(OPTIONS) - len(options())
    if not unknown:
        return ""
    version = ".".join(map(str, _version())) or "of unknown version"
    return f"{unknown} compiler options are left out: libtpu {version} is not known to take them"


def choose() -> None:
    """Makes these the options of every program of this process; before JAX meets its devices. CPUs take no notice."""
    flags = [f"--{name}={str(value).lower()}" for name, value in options().items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()
    if left_out() and _may_run_on_tpu():
        print(f"warning: {left_out()}, and programs may be slower than planned", file=sys.stderr, flush=True)


def _version() -> tuple[int, ...]:
    """The numbers of libtpu's version; none without libtpu, and of a library that is not the package's."""
    if _library_elsewhere():
        return ()
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("libtpu").split(".dev")[0])))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _library_elsewhere() -> bool:
    """Whether TPU_LIBRARY_PATH names another library than the package's, which JAX sets it to."""
    path, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    if not path:
        return False
    return package is None or package.origin is None or Path(path).parent != Path(package.origin).parent


def _may_run_on_tpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "tpu") != "cpu" and bool(_version() or _library_elsewhere())
