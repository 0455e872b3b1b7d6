"""Options of the TPU's compiler that training steps are compiled with, here and for TPUs that are not there."""

import os

OPTIONS: dict[str, str | bool] = {
    # The SparseCores run gathers of weights, scatters of gradients and sums beside the TensorCore: on the chips that
    # have them nothing else makes these asynchronous. Over several dimensions of the torus they stay true scatters.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_reduce_scatter_offload_tracing": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    # Gathers and scatters of rows stay on the TensorCore: the SparseCores are busy, and in a program that leaves them
    # to these nothing of their time can be read.
    "xla_tpu_offload_gather_to_sparsecore": False,
    "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
}


def choose() -> None:
    """Makes these the options of every program of this process; before JAX meets its devices. CPUs take no notice."""
    flags = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*flags, os.environ.get("LIBTPU_INIT_ARGS", "")]).strip()
