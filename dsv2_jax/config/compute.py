"""Settings of the computation: dtypes, rematerialization and kernels."""

import dataclasses
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Precision, rematerialization and kernels. None of these changes the model."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    remat: Literal["none", "full", "attention"] = "full"  # what the backward pass recomputes; see model/transformer.py
    loss_chunk: int = 1024  # tokens per chunk of logits
    kernels: Literal["auto", "pallas", "xla"] = "auto"  # of attention and experts; auto: pallas on TPU v5e and newer

    def __post_init__(self) -> None:
        check(self.loss_chunk > 0, "compute.loss_chunk must be positive")
