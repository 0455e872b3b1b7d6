"""The small pieces every layer is made of: normalisation, the SwiGLU FFN, parameters declared by name."""

import functools
import sys
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Compute, Model, check
from dsv2_jax.model import parameters
from dsv2_jax.model.matmul import project
from dsv2_jax.parallel.mesh import device_kind, platform
from pallas_kernels import chips
from pallas_kernels.quantized import Quantized, Weight

# The gate is float32 (section 2.2), and so is a reward model's score; embedding rows are cast when read.
KEPT_FLOAT32 = ("norm", "w_router", "w_embed", "w_score")

Kernels = Literal["pallas", "xla"]


def compute_dtype(compute: Compute) -> Any:
    """The dtype of activations and matmul operands; `auto` is float32 on CPU and bfloat16 elsewhere."""
    if compute.dtype == "auto":
        return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(compute.dtype)


def kernels(compute: Compute, chip: str | None = None) -> Kernels:
    """What attention, its pages in generation and routed experts run on.

    `auto` is `pallas` on a TPU that the kernels are made for, and `xla` elsewhere. chip: the TPU that is planned for,
    such as v5p; by default the devices that the program being traced will run on. Of devices that nobody has tried, and
    of TPUs without kernels, one line on stderr says so. Raises ValueError for `pallas` where no kernel runs.
    """
    here = platform() if chip is None else "tpu"
    if here not in ("cpu", "tpu"):
        _warn_once(f"nobody has run this program on {here} devices: it takes XLA's own operations, untested there")
    if compute.kernels == "xla":
        return "xla"
    if (chip or chips.here()) in chips.KERNEL_CHIPS:
        return "pallas"
    name = chip or device_kind()
    check(
        compute.kernels == "auto",
        f"compute.kernels is pallas, but the kernels run on TPUs of {', '.join(chips.KERNEL_CHIPS)} and not on {name}: "
        "leave it at auto",
    )
    if here == "tpu":
        _warn_once(
            f"there are no kernels for {name}: attention and experts take XLA's own operations, which are slower"
        )
    return "xla"


@functools.cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def cast(params: Any, dtype: Any) -> Any:
    """Parameters as matmul operands of `dtype`; norms, gate, score and embedding stay float32.

    Done once per step, before the layers are scanned: a cast inside would be repeated by every recomputation.
    """

    def leaf(path: tuple, w: Weight) -> Weight:
        if isinstance(w, Quantized) or path[-1].key.startswith(KEPT_FLOAT32):
            return w
        return w.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda w: isinstance(w, Quantized))


def stored_dtype(name: str, dtype: Any) -> Any:
    """The dtype that a parameter is held in where matmul operands are `dtype`: float32 of what `cast` leaves alone."""
    return jnp.dtype(jnp.float32 if name.startswith(KEPT_FLOAT32) else dtype)


def declare(module: nn.Module, model: Model, names: list[str]) -> dict[str, Array]:
    """Declares parameters on a Linen module: N(0, initializer_range) (section 3.1.2), norm scales one; float32."""

    def initializer(name: str) -> Any:
        return nn.initializers.ones if name.startswith("norm") else nn.initializers.normal(model.initializer_range)

    if not module.is_initializing():  # on a mesh they are this device's shards, in generation some lie otherwise
        return dict(module.variables["params"])
    return {name: module.param(name, initializer(name), parameters.shape(name, model)) for name in names}


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dimension, in float32; the result in x's dtype."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


def swiglu(x_BTD: Array, w_gate_DI: Array, w_up_DI: Array, w_down_ID: Array) -> Array:
    """down(silu(gate(x)) * up(x)), [B, T, D] in x's dtype."""
    return project(gated(x_BTD, w_gate_DI, w_up_DI), w_down_ID)


def gated(x_BTD: Array, w_gate_DI: Array, w_up_DI: Array) -> Array:
    """silu(gate(x)) * up(x), [B, T, I] in x's dtype."""
    return jax.nn.silu(project(x_BTD, w_gate_DI)) * project(x_BTD, w_up_DI)
