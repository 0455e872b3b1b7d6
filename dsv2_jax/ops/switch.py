"""Picks the implementation of a program's operations from the setting, the platform and the chip."""

import dataclasses
import functools
import sys
from typing import Any, Literal

import jax.numpy as jnp

from dsv2_jax.config import AXES, SINGLE, Compute, Mesh, Model, check
from dsv2_jax.parallel.mesh import device_kind, platform
from pallas_kernels import chips

# cpu: XLA loops with the steps that make CPUs fast. xla: the same loops without them. pallas: TPU kernels.
Implementation = Literal["cpu", "xla", "pallas"]

_UNROLLED_LAYERS = 16  # maximum number: each unrolled layer adds about 2 s of compilation


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a layer runs: the mesh that holds it, its implementation, and its number in an unrolled program."""

    mesh: Mesh = SINGLE
    implementation: Implementation = "cpu"
    layer: int = 0


def on_cpu() -> bool:
    """Whether the program being traced will run on CPUs."""
    return platform() == "cpu"


def implementation(compute: Compute, chip: str | None = None) -> Implementation:
    """The implementation of attention and of routed experts.

    With `compute.kernels` `auto` it is `pallas` on a TPU that the kernels support, `cpu` on CPUs and `xla` elsewhere.
    With `xla` it is never `pallas`.

    Args:
      compute: The settings.
      chip: The TPU to plan for, such as v5p. By default the devices of the program being traced. An untested platform
        or a TPU without kernels prints one warning on stderr.

    Raises:
      ValueError: The setting is `pallas` and no kernel runs on the chip.
    """
    here = platform() if chip is None else "tpu"
    if here not in ("cpu", "tpu"):
        _warn_once(f"this program is untested on {here} devices, where it runs on XLA operations")
    loops: Implementation = "cpu" if here == "cpu" else "xla"
    if compute.kernels == "xla":
        return loops
    if (chip or chips.here()) in chips.KERNEL_CHIPS:
        return "pallas"
    name = chip or device_kind()
    check(
        compute.kernels == "auto",
        f"compute.kernels is pallas, but the kernels run on TPUs of {', '.join(chips.KERNEL_CHIPS)} and not on {name}: "
        "leave it at auto",
    )
    if here == "tpu":
        _warn_once(f"there are no kernels for {name}: attention and experts run on XLA operations, which are slower")
    return loops


def of_pages(model: Model, implementation: Implementation) -> Implementation:
    """The implementation of attention over a paged cache: the decode kernel supports MLA only, so GQA runs on XLA."""
    return "xla" if implementation == "pallas" and model.attention.kind != "mla" else implementation


def compute_dtype(compute: Compute) -> Any:
    """The dtype of activations and matmul operands; `auto` is float32 on CPU and bfloat16 elsewhere."""
    if compute.dtype == "auto":
        return jnp.dtype(jnp.float32 if on_cpu() else jnp.bfloat16)
    return jnp.dtype(compute.dtype)


def unrolls(model: Model, mesh: Mesh) -> bool:
    """Whether training runs its layers unrolled: on a single CPU device, for models that are shallow enough to compile.

    There a scan copies each layer's parameters, activations and gradients into and out of stacks, and widens complete
    bfloat16 stacks to float32. That takes a third of a step.
    """
    return on_cpu() and mesh.size(*AXES) == 1 and model.num_hidden_layers <= _UNROLLED_LAYERS


@functools.cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
