"""The op and its kernels in plain jnp: the same names, and the same arguments without the tiles. For tests."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantized import Quantized, Weight


def grouped_swiglu(
    x_ND: Array,
    experts_NK: Array,
    gates_NK: Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    max_pairs: int | None = None,
    buffer_size: int | None = None,
) -> Array:
    """As `grouped_swiglu` of op.py. Every expert computes every token in float32. buffer_size: not used."""
    del buffer_size
    w_gate_EDF, w_up_EDF, w_down_EFD = (
        (w.values.astype(jnp.float32) * w.scale) if isinstance(w, Quantized) else w.astype(jnp.float32) for w in weights
    )
    if max_pairs is not None:
        rank_NK = jnp.argsort(jnp.argsort(experts_NK.reshape(-1), stable=True)).reshape(experts_NK.shape)
        experts_NK = jnp.where(rank_NK < max_pairs, experts_NK, w_gate_EDF.shape[0])
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    x, (experts, _, _) = x_ND.astype(jnp.float32), w_gate_EDF.shape
    hidden_NEF = jax.nn.silu(product("nd,edf->nef", x, w_gate_EDF)) * product("nd,edf->nef", x, w_up_EDF)
    y_NED = product("nef,efd->ned", hidden_NEF, w_down_EFD)
    gates_NE = product("nk,nke->ne", gates_NK, jax.nn.one_hot(experts_NK, experts))  # an id of E gives no 1
    return product("ne,ned->nd", gates_NE, y_NED).astype(x_ND.dtype)


def gmm(lhs_PD: Array, rhs_EDF: Weight, group_sizes_E: Array, transpose_rhs: bool = False) -> Array:
    """See grouped_matmul.gmm."""
    return gmm_sum((lhs_PD,), (rhs_EDF,), group_sizes_E, transpose_rhs)


def gmm_sum(lhs: Sequence[Array], rhs: Sequence[Weight], group_sizes_E: Array, transpose_rhs: bool = False) -> Array:
    """See grouped_matmul.gmm_sum."""
    products = [_ragged(x, w, group_sizes_E, 2 if transpose_rhs else 1) for x, w in zip(lhs, rhs, strict=True)]
    return sum(products[1:], start=products[0]).astype(lhs[0].dtype)


def tgmm(lhs_PD: Array, rhs_PF: Array, group_sizes_E: Array) -> Array:
    """See weight_gradient.tgmm."""
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(
        lhs_PD, rhs_PF, group_sizes_E, dims, precision=_precision(lhs_PD), preferred_element_type=jnp.float32
    ).astype(lhs_PD.dtype)


def tgmm_each(lhs_PD: Array, rhs: Sequence[Array], group_sizes_E: Array) -> list[Array]:
    """See weight_gradient.tgmm_each."""
    return [tgmm(lhs_PD, r, group_sizes_E) for r in rhs]


def gate_up(
    x_PD: Array, w_gate_EDF: Weight, w_up_EDF: Weight, gates_P: Array, group_sizes_E: Array, keep: bool = False
) -> list[Array]:
    """See swiglu.gate_up."""
    gate_PF, up_PF = (_ragged(x_PD, w, group_sizes_E, 1) for w in (w_gate_EDF, w_up_EDF))
    hidden_PF = jax.nn.silu(gate_PF) * up_PF * gates_P[:, None]
    return [a.astype(x_PD.dtype) for a in ((hidden_PF, gate_PF, up_PF) if keep else (hidden_PF,))]


def hidden_gradient(
    g_PD: Array, w_down_EFD: Array, gate_PF: Array, up_PF: Array, gates_P: Array, group_sizes_E: Array
) -> tuple[Array, Array, Array, Array]:
    """See swiglu.hidden_gradient."""
    d_hidden_PF = _ragged(g_PD, w_down_EFD, group_sizes_E, 2)
    a_PF, u_PF = gate_PF.astype(jnp.float32), up_PF.astype(jnp.float32)
    sigmoid_PF = jax.nn.sigmoid(a_PF)
    silu_PF = a_PF * sigmoid_PF
    d_gates_P = (silu_PF * u_PF * d_hidden_PF).sum(axis=1)
    d_hidden_PF *= gates_P[:, None]
    d_gate_PF = d_hidden_PF * u_PF * (sigmoid_PF + silu_PF * (1 - sigmoid_PF))
    hidden_PF = silu_PF * u_PF * gates_P[:, None]
    d_up_PF, dtype = d_hidden_PF * silu_PF, g_PD.dtype
    return d_gate_PF.astype(dtype), d_up_PF.astype(dtype), hidden_PF.astype(dtype), d_gates_P


def combine(y_PD: Array, row_NK: Array, kept_NK: Array) -> Array:
    """See combine.combine. Adds up K gathers of [N, D], which cost less than one of [N, K, D]."""
    y_ND = jnp.zeros((row_NK.shape[0], y_PD.shape[1]), jnp.float32)
    for k in range(row_NK.shape[1]):
        rows_ND = y_PD.at[row_NK[:, k]].get(mode="promise_in_bounds").astype(jnp.float32)
        # A row that no pair keeps may be NaN, which a product with 0 would not remove.
        y_ND += jnp.where(kept_NK[:, k, None], rows_ND, 0)
    return y_ND.astype(y_PD.dtype)


def _ragged(x_PD: Array, w_E: Weight, group_sizes_E: Array, contract: int) -> Array:
    """Each row with its group's matrix, over dimension `contract` of w [E, *, *]: float32."""
    if isinstance(w_E, Quantized):
        scale_PF = jnp.repeat(w_E.scale[:, 0], group_sizes_E, axis=0, total_repeat_length=x_PD.shape[0])
        return _ragged(x_PD, w_E.values.astype(x_PD.dtype), group_sizes_E, contract) * scale_PF
    dims = lax.RaggedDotDimensionNumbers((((1,), (contract,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(
        x_PD, w_E, group_sizes_E, dims, precision=_precision(x_PD), preferred_element_type=jnp.float32
    )


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
