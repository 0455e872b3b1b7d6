"""Options of the TPU compiler for all programs, on TPUs and when compiling for TPUs that are not attached."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Option:
    """A value, and the versions of libtpu that accept the option; any other version would end the process.

    The default range is tested with 0.0.42.1 (of jax 0.10.2), 0.0.50.1 (of jax 0.12.0) and 0.0.52 (the newest).
    """

    value: bool
    since: tuple[int, ...] = (0, 0, 42)
    before: tuple[int, ...] = (0, 0, 53)


OPTIONS = {
    # SparseCores run all-gathers of weights and reduce-scatters of gradients while the TensorCore computes. On chips
    # that have SparseCores nothing else makes these collectives asynchronous. The options also stop XLA from replacing
    # a reduce-scatter over several dimensions of the torus by an all-reduce.
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
    # Gathers and scatters of rows stay on the TensorCore: the SparseCores are busy with collectives, and the compiler
    # reports no time for rows that it moves there.
    "xla_tpu_offload_gather_to_sparsecore": Option(False),
    "xla_tpu_enable_offloading_scatter_to_sparsecore": Option(False),
}


def options() -> dict[str, bool]:
    """The options that the installed libtpu accepts."""
    version = _version()
    return {name: option.value for name, option in OPTIONS.items() if option.since <= version < option.before}


def left_out() -> str:
    """A sentence on the options that the installed libtpu may not accept; empty if there are none."""
    unknown = len(OPTIONS) - len(options())
    if not unknown:
        return ""
    version = ".".join(map(str, _version())) or "of unknown version"
    return f"left out {unknown} compiler option{'s' * (unknown > 1)} untested with libtpu {version}"


def choose() -> None:
    """Sets the options for all programs of this process. Call it before JAX initialises its devices; CPUs ignore it."""
    flags = [f"--{name}={str(value).lower()}" for name, value in options().items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()
    if left_out() and _may_run_on_tpu():
        print(f"warning: {left_out()}; programs may be slower than planned", file=sys.stderr, flush=True)


def _version() -> tuple[int, ...]:
    """The numbers of libtpu's version; empty without libtpu, and for a library other than the package's."""
    if _library_elsewhere():
        return ()
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("libtpu").split(".dev")[0])))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _library_elsewhere() -> bool:
    """Whether TPU_LIBRARY_PATH names another library than the libtpu package's, which is JAX's default."""
    path, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    if not path:
        return False
    return package is None or package.origin is None or Path(path).parent != Path(package.origin).parent


def _may_run_on_tpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "tpu") != "cpu" and bool(_version() or _library_elsewhere())
