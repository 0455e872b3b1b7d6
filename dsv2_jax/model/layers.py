"""Building blocks of every layer: normalisation, the SwiGLU FFN, parameters declared by name."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax import parameters
from dsv2_jax.config import Model
from dsv2_jax.ops.matmul import project
from pallas_kernels.quantized import Quantized, Weight


def cast(params: Any, dtype: Any) -> Any:
    """Parameters as matmul operands of `dtype`; norms, router, score and embedding stay float32.

    A step casts once, before it scans the layers. Inside a layer, every recomputation would repeat the cast.
    """

    def leaf(path: tuple, w: Weight) -> Weight:
        if isinstance(w, Quantized) or path[-1].key.startswith(parameters.KEPT_FLOAT32):
            return w
        return w.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda w: isinstance(w, Quantized))


def stored_dtype(name: str, dtype: Any) -> Any:
    """The dtype of a parameter where matmul operands are `dtype`: float32 for parameters that `cast` leaves alone."""
    return jnp.dtype(jnp.float32 if name.startswith(parameters.KEPT_FLOAT32) else dtype)


def declare(module: nn.Module, model: Model, names: list[str]) -> dict[str, Array]:
    """Declares float32 parameters on a module: `parameters.initial`, else N(0, initializer_range) (section 3.1.2)."""

    def initializer(name: str) -> Any:
        constant = parameters.initial(name)
        drawn = nn.initializers.normal(model.initializer_range)
        return drawn if constant is None else nn.initializers.constant(constant)

    if not module.is_initializing():  # given parameters may differ in shape: shards, transposed matrices in generation
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
