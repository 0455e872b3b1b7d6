"""Options of the TPU's compiler that training steps are compiled with."""

OPTIONS: dict[str, str | bool] = {
    # Programs that leave gathers and scatters to the SparseCore cannot be printed, nor their time estimated.
    "xla_tpu_offload_gather_to_sparsecore": False,
    "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
}
